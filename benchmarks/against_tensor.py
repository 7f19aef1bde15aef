"""One Llama on one rank, cut by tensor parallelism and cut into stages: what each moves, holds and takes, beside formulas.

A step of training and a pass of inference over the same micro-batches, in the same processes, in turns. On a CPU a rank has
one thread, and ranks share the cores and their memory's bandwidth: predictions start from what the whole model takes on each
rank while all compute it at once. Bytes and messages are what a rank sends or takes part in; memory is that of its tensors.
"""

import statistics
import time
from dataclasses import replace

import torch
import torch.distributed as dist
from clocks import synchronize, timed
from llama_layers import DTYPES, SHAPES, VOCABULARY, config_of, cross_entropy, model_of, steps

from llmlab.accounting import TensorAccounting, storage_bytes
from llmlab.config import ModelConfig
from llmlab.memory import activation_bytes, parameter_counts
from llmlab.parallel import Communicator, Pipeline, launch, parallelize
from llmlab.parallel.schedules import Costs, Send, forward_only, lower, one_f_one_b, partition_layers, simulate
from llmlab.parallel.stages import llama_stages

WAYS, PASSES = ("alone", "at once", "tensor", "pipeline"), ("training", "inference")


class Watched(Communicator):
    """Ranks that add up the seconds they spend on messages."""

    def __init__(self, mesh, clock):
        super().__init__(mesh)
        self.clock, self.seconds = clock, 0.0

    def spend(self, collective, *args):
        start = self.clock()
        result = collective(*args)
        self.seconds += self.clock() - start
        return result

    def all_reduce(self, x, op="sum"):
        return self.spend(super().all_reduce, x, op)

    def all_gather(self, x, dim=-1):
        return self.spend(super().all_gather, x, dim)

    def reduce_scatter(self, x, dim=-1):
        return self.spend(super().reduce_scatter, x, dim)


class InOnePiece:
    """A model whose rank sees every micro-batch, alone or with its part of each layer."""

    def __init__(self, model, ids, ranks=None):
        self.model, self.ids, self.ranks = model, ids, ranks
        self.parameters = list(model.parameters())

    def training(self):
        for one in self.ids:
            (cross_entropy(self.model(one, use_cache=False).logits, one) / len(self.ids)).backward()

    @torch.no_grad()
    def inference(self):
        return [self.model(one, use_cache=False).logits for one in self.ids]

    def run(self, what):
        """Seconds spent on messages; the messages; their bytes."""
        if self.ranks is None:
            getattr(self, what)()
            return 0.0, 0, 0.0
        self.ranks.log.clear()
        self.ranks.seconds = 0.0
        getattr(self, what)()
        return self.ranks.seconds, len(self.ranks.log), sum(message.sent_bytes for message in self.ranks.log)


class InStages:
    """This rank's stage of a pipeline: 1F1B, and forwards alone."""

    def __init__(self, model, ids, mesh, sizes, clock):
        self.ids, rank, shape = ids, mesh.get_local_rank(), (*ids[0].shape, model.config.hidden_size)
        schedules = {"training": one_f_one_b(mesh.size(), len(ids)), "inference": forward_only(mesh.size(), len(ids))}
        stages = llama_stages(model, schedules["training"], rank, sizes)
        self.parameters = [parameter for stage in stages for parameter in stage.parameters()]
        self.pipelines = {
            what: Pipeline(stages, schedule, mesh, shape, model.dtype, cross_entropy, clock)
            for what, schedule in schedules.items()
        }

    def run(self, what):
        """Seconds that its operations did not take; the messages; their bytes."""
        pipeline, start = self.pipelines[what], time.monotonic()
        _, record = pipeline.step(self.ids, self.ids)
        busy = sum(ran.end - ran.start for ran in record.ran)
        return (
            time.monotonic() - start - busy,
            sum(isinstance(step, Send) for step in pipeline.program),
            record.sent_bytes,
        )


def peak_bytes(device, call, held):
    """The most that a call's tensors had at a time, beside those that are held anyway."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with TensorAccounting() as accounting:
        accounting.count(held)
        before = accounting.live_bytes
        call()
    return accounting.peak_bytes - before


def message_seconds(mesh, shape, times=10):
    """What a sum, a gathering of logits and a tensor to the next rank take, by run."""
    device, dtype, rank = mesh.device_type, DTYPES[mesh.device_type], mesh.get_local_rank()
    ranks, stream = Communicator(mesh), torch.zeros(shape, device=device, dtype=dtype)
    logits = torch.zeros(*shape[:2], VOCABULARY // mesh.size(), device=device, dtype=dtype)

    def hand_on():
        for sender in range(2):  # there and back
            if rank == sender:
                dist.send(stream, 1 - sender)
            elif rank == 1 - sender:
                dist.recv(stream, sender)

    found = {}
    for name, call, each in (("sum", lambda: ranks.all_reduce(stream), 1), ("gather", lambda: ranks.all_gather(logits), 1), ("transfer", hand_on, 2)):  # fmt: skip
        runs = [timed(device, lambda c=call: [c() for _ in range(times)]) for _ in range(6)][1:]
        found[name] = [(run["ended"] - run["began"]) / times / each for run in runs]
    return found


def three_ways(mesh, m, sizes, runs):
    """For each way and pass: when this rank began and ended; the share of its time that it computed; messages, bytes, memory."""
    device, rank, p = mesh.device_type, mesh.get_local_rank(), mesh.size()
    watching = False

    def clock():
        if watching:  # on a GPU an operation has ended when the device says so
            synchronize(device)
        return time.monotonic()

    if device == "cpu":
        torch.set_num_threads(1)
    (D, *_), _, tokens = SHAPES[device]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (m, tokens), generator=generator).to(device).split(1)
    whole, ranks = InOnePiece(model_of(p, device), ids), Watched(mesh, clock)
    ways = {
        "alone": whole, "at once": whole, "tensor": InOnePiece(parallelize(model_of(p, device), ranks), ids, ranks),
        "pipeline": InStages(model_of(p, device), ids, mesh, sizes, clock),
    }  # fmt: skip
    cases = [(name, what) for what in PASSES for name in ways if name != "alone" or rank == 0]
    found = {(name, what): {"runs": [], "watched": [], "computed": []} for name in ways for what in PASSES}
    for name, what in cases:  # the first time; gradients are there from now on
        if name != "alone":
            ways[name].run("training")
            weights, gradients = ways[name].parameters, [parameter.grad for parameter in ways[name].parameters]
            peak = peak_bytes(device, lambda n=name, w=what: ways[n].run(w), weights + gradients)
            held = storage_bytes(weights + (gradients if what == "training" else []))
            found[name, what] |= {"peak_bytes": peak, "held_bytes": held}
    for watching in (False, True):
        for turn in range(runs):
            for name, what in list(found)[:: 1 if turn % 2 else -1]:
                said = []

                def one_pass(name=name, what=what, said=said):
                    if name != "alone" or rank == 0:
                        said.append(ways[name].run(what))

                when = timed(device, one_pass)
                found[name, what]["watched" if watching else "runs"].append(when)
                if said and watching:
                    (waited, messages, sent), spent = said[0], when["ended"] - when["began"]
                    found[name, what]["computed"].append(spent - waited)
                    found[name, what] |= {"messages": messages, "sent_bytes": sent}
    return found, message_seconds(mesh, (1, tokens, D))


def layer_costs(config, tokens):
    """The arithmetic of each layer, and of the head, for a token forward: 2 operations a weight, and attention's products."""
    counts = parameter_counts(config)
    layer = 2 * (counts.attention + counts.mlp) / config.num_layers + 2 * config.num_heads * config.head_size * (
        tokens + 1
    )
    return [layer] * config.num_layers + [2 * counts.head]


def sizes_of(config, tokens, p):
    """Layers of each stage, cut by cost; the last has the head too."""
    *sizes, last = partition_layers(layer_costs(config, tokens), p)
    return [*sizes, last - 1]


def predicted(config, p, m, tokens, element, sizes, once, message):
    """By way and pass, from formulas: messages, bytes, memory of the fullest rank, seconds and the share computed.

    once: seconds of a pass over the whole model on each rank at the same time; message: seconds of one of each kind.
    """
    counts, L, D, V = parameter_counts(config), config.num_layers, config.hidden_size, config.vocab_size
    stream, logits, norm = element * tokens * D, element * tokens * V, (4 + 2 * element) * D * tokens
    at_loss = norm + 12 * V * tokens  # the final norm; the loss's log-probabilities and gradients, in float32
    forward = once["inference"] / m
    back = once["training"] / m - forward
    costs = layer_costs(config, tokens)
    ends = [sum(sizes[: stage + 1]) for stage in range(p)]
    shares = [(sum(costs[end - size : end]) + (costs[-1] if end == L else 0)) / sum(costs) for end, size in zip(ends, sizes, strict=True)]  # fmt: skip
    held = [size * (counts.attention + counts.mlp + 2 * L * D) // L for size in sizes]
    held[0] += counts.embedding
    held[-1] += counts.head + D

    def kept(layers, t=1):
        return activation_bytes(replace(config, num_layers=layers), 1, tokens, element, tensor_parallel=t)

    in_stages = [kept(size) * min(p - rank, m) + (at_loss if rank == p - 1 else 0) for rank, size in enumerate(sizes)]
    ring, found = 2 * (p - 1) / p, {}
    for what, schedule, sums in (
        ("training", one_f_one_b(p, m), 4 * L + 2),
        ("inference", forward_only(p, m), 2 * L + 1),
    ):
        train = what == "training"
        times = [share * forward for share in shares], [share * back / 2 for share in shares]
        run = simulate(schedule, Costs(*times, times[1], message["transfer"]))
        messages = m * (sums * message["sum"] + message["gather"])
        copies = 2 if train else 1  # weights, and their gradients
        rest = counts.total - counts.norm
        all_logits = m * logits
        found["tensor", what] = {
            "messages": m * (sums + 1), "sent_bytes": m * (sums * ring * stream + ring / 2 * logits),
            "seconds": once[what] / p + messages, "computed": 1 / (1 + messages * p / once[what]),
            "held_bytes": copies * element * (rest // p + counts.norm), "peak_bytes": kept(L, p) + at_loss if train else all_logits,
        }  # fmt: skip
        sends = [sum(isinstance(step, Send) for step in steps) for steps in lower(schedule).steps]
        found["pipeline", what] = {
            "messages": max(sends), "sent_bytes": max(sends) * stream, "seconds": float(run.makespan),
            "computed": float(1 - sum(run.idle) / (p * run.makespan)), "held_bytes": copies * element * max(held),
            "peak_bytes": max(in_stages) if train else all_logits,
        }  # fmt: skip
        found["alone", what] = {
            "messages": 0, "sent_bytes": 0, "seconds": None, "computed": 1.0, "held_bytes": copies * element * counts.total,
            "peak_bytes": kept(L) + at_loss if train else all_logits,
        }  # fmt: skip
    return found


def measure_against(device, m, runs, p=2):
    """A row for each way and pass: measured, and predicted."""
    tokens, element = SHAPES[device][2], DTYPES[device].itemsize
    config = ModelConfig.from_huggingface(config_of(p, device).to_dict(), "LlamaForCausalLM")
    sizes = sizes_of(config, tokens, p)
    by_rank = launch(three_ways, p, m, sizes, runs, device=device, timeout=580)
    found, message = [rank for rank, _ in by_rank], {k: statistics.median(v) for k, v in by_rank[0][1].items()}
    seconds = {case: steps([rank[case]["runs"] for rank in found]) for case in found[0]}
    once = {what: statistics.median(seconds["at once", what]) for what in PASSES}
    formulas = predicted(config, p, m, tokens, element, sizes, once, message)
    for way, what in formulas:
        case, ranks = (way, what), found if way != "alone" else found[:1]
        watched = steps([rank[case]["watched"] for rank in found])
        sampled = [
            statistics.mean(computed) / whole
            for *computed, whole in zip(*(rank[case]["computed"] for rank in ranks), watched, strict=True)
        ]
        memory = [found[0]["at once", what]] if way == "alone" else [rank[case] for rank in found]
        yield {
            "way": way, "ranks": len(ranks), "what": what, "m": m, "tokens": tokens, "stages": sizes if way == "pipeline" else None,
            "predicted": formulas[case],
            "measured": {
                "messages": max(rank[case]["messages"] for rank in ranks), "sent_bytes": max(rank[case]["sent_bytes"] for rank in ranks),
                "seconds": statistics.median(seconds[case]), "computed": statistics.median(sampled),
                "held_bytes": max(one["held_bytes"] for one in memory), "peak_bytes": max(one["peak_bytes"] for one in memory),
            },
            "all_at_once_seconds": once[what], "message_seconds": message, "seconds": seconds[case], "computed_samples": sampled,
            "peak_bytes_by_rank": [one["peak_bytes"] for one in memory],
        }  # fmt: skip
