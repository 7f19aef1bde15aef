"""The engine gives transformers' greedy tokens under every policy and option, and no fault of one request harms another."""

import itertools
import math
import random
import signal
import threading

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmlab.batching.policies import OrcaBatching, PrefillFirst, SplitFuse, StaticBatching
from llmlab.checkpoint import load_model
from llmlab.engine import Engine, SamplingParams, runner
from llmlab.engine.sampling import keep_likely, sample
from llmlab.kernels import reference
from llmlab.model import Transformer

VOCABULARY = 600
POLICIES = {
    "splitfuse": lambda: SplitFuse(64),
    "chunks of 1": lambda: SplitFuse(32, 1),
    "chunks of 7": lambda: SplitFuse(32, 7),
    "chunks of 15": lambda: SplitFuse(64, 15),
    "chunks of 16": lambda: SplitFuse(64, 16),
    "chunks of 17": lambda: SplitFuse(64, 17),
    "orca": lambda: OrcaBatching(6, 128),
    "prefill first": lambda: PrefillFirst(128),
    "static": lambda: StaticBatching(4),
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def theirs():
    """A small model whose greedy tokens vary."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=96, intermediate_size=160, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


@pytest.fixture(scope="module")
def models(theirs):
    """Ours on each device, made when it is asked for."""
    made = {}

    def of(device):
        if device not in made:
            made[device] = Transformer.from_transformers(theirs).to(device)
        return made[device]

    return of


@pytest.fixture(scope="module")
def work(theirs):
    """Prompts, how many tokens of each, and what transformers generates."""
    rng = random.Random(0)
    shared = [rng.randrange(VOCABULARY) for _ in range(40)]
    prompts = [[rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 70))] for _ in range(7)]
    prompts += [shared + [rng.randrange(VOCABULARY) for _ in range(n)] for n in (1, 9)] + [shared[:32], shared]
    counts = [rng.randrange(1, 30) for _ in prompts]
    return prompts, counts, [generated(theirs, p, n) for p, n in zip(prompts, counts, strict=True)]


def generated(theirs, prompt, count):
    with torch.no_grad():
        told = torch.tensor([prompt])
        ids = theirs.generate(
            told,
            attention_mask=torch.ones_like(told),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return ids[0, len(prompt) :].tolist()


def asked(counts, **more):
    return [SamplingParams(max_new_tokens=n, ignore_eos=True, **more) for n in counts]


def engine(model, policy=None, **options):
    return Engine(model, policy or SplitFuse(64), **{"num_blocks": 100, "max_num_seqs": 6, **options})


def to_the_end(engine):
    while engine.has_work:
        engine.step()


def assert_nothing_leaked(engine):
    assert not engine.has_work
    assert sorted(engine._rows) == list(range(engine.state.max_num_seqs))
    assert engine.kv.num_free_blocks == engine.kv.num_blocks
    engine.kv.check()


def test_the_works_tokens_vary(work):
    _, _, expected = work
    assert len({token for tokens in expected for token in tokens}) > 60


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "options",
    [{}, {"ahead": False}, {"num_blocks": 7}, {"prefix_caching": False, "graphs": False}, {"reserve_max_length": True, "max_length": 128}],
    ids=["as it is", "not ahead", "pre-empted", "no cache, no graphs", "contiguous"],
)  # fmt: skip
def test_greedy_tokens_are_transformers(models, work, policy, options, device):
    """Invariant 22; and 19: with 7 blocks requests are preempted, and go on where they were."""
    prompts, counts, expected = work
    made = engine(models(device), POLICIES[policy](), **options)
    for _ in range(2):  # the second time with a cache of prefixes
        completions = made.generate(prompts, asked(counts))
        assert [c.token_ids for c in completions] == expected
        assert {c.finish_reason for c in completions} == {"length"}
    assert_nothing_leaked(made)
    hits = any(c.cached_tokens for c in completions)
    assert hits == (options.get("prefix_caching", True) and not options.get("reserve_max_length", False))


def test_a_small_pool_preempts(models, work):
    prompts, counts, _ = work
    made = engine(models("cpu"), num_blocks=7)
    requests = [made.add(p, s) for p, s in zip(prompts, asked(counts), strict=True)]
    while made.has_work:
        made.step()
    assert sum(r.preemptions for r in requests) > 0


def test_the_real_model_and_text(theirs):
    model, tokenizer = load_model("smollm2-135m", "cpu")
    made = Engine(Transformer.from_transformers(model), SplitFuse(64), tokenizer, num_blocks=20, max_num_seqs=2)
    prompt = "The capital of France is"
    (completion,) = made.generate([prompt], SamplingParams(max_new_tokens=12))
    expected = generated(model, tokenizer(prompt)["input_ids"], 12)
    ended = expected.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in expected else 12
    assert completion.token_ids == expected[:ended]
    assert completion.text == tokenizer.decode(expected[:ended], skip_special_tokens=True)
    word = completion.text.split()[3]
    (cut,) = made.generate([prompt], SamplingParams(max_new_tokens=12, stop=(word,)))
    assert cut.finish_reason == "stop"
    assert cut.text == completion.text[: completion.text.index(word)]
    assert_nothing_leaked(made)


def test_where_blocks_lie_does_not_matter(models, work):
    """Invariant 23: the same logits, bit for bit, from permuted blocks of a pool full of NaN."""
    prompts, counts, expected = work
    for seed in range(3):
        made = engine(models("cpu"), num_blocks=60)
        made.runner.cache.keys.fill_(math.nan)
        made.runner.cache.values.fill_(math.nan)
        taken = [
            made.add([1] * n, SamplingParams(max_new_tokens=1)) for n in random.Random(seed).sample(range(1, 60), 5)
        ]
        made.step()
        made.abort(taken[seed])
        assert [c.token_ids for c in made.generate(prompts, asked(counts))] == expected


@pytest.mark.gpu
def test_every_batch_size_under_graphs(models, work):
    """Invariant 24: growing from 1 to the largest and shrinking again gives eager's tokens."""
    prompts, _, _ = work
    model = models("cuda")
    made = [Engine(model, SplitFuse(64), num_blocks=200, max_num_seqs=40, graphs=graphs) for graphs in (True, False)]
    found = []
    for each in made:
        requests = []
        for n in range(40):
            requests.append(each.add(prompts[n % 7], SamplingParams(max_new_tokens=45 - abs(n - 20), ignore_eos=True)))
            each.step()
        while each.has_work:
            each.step()
        found.append([r.token_ids for r in requests])
        assert_nothing_leaked(each)
    assert found[0] == found[1]


def test_stopping_tokens_end_a_request_and_its_extra_token_is_thrown_away(models, work):
    prompts, counts, expected = work
    longest = max(range(len(counts)), key=lambda n: counts[n])
    stop = next(t for t in expected[longest][3:] if t not in expected[longest][:3])
    at = expected[longest].index(stop) + 1
    made = engine(models("cpu"))
    params = SamplingParams(max_new_tokens=counts[longest], stop_token_ids=(stop,))
    (completion,) = made.generate([prompts[longest]], params)
    assert (completion.token_ids, completion.finish_reason) == (expected[longest][:at], "stop")
    ending = Engine(models("cpu"), SplitFuse(64), num_blocks=50, max_num_seqs=2, eos_token_id=stop)
    assert ending.generate([prompts[longest]], SamplingParams(max_new_tokens=30))[0].token_ids == expected[longest][:at]
    assert_nothing_leaked(made)
    assert_nothing_leaked(ending)


def test_seeds_draw_the_same_tokens_in_any_batch(models, work):
    prompts, _, _ = work
    params = [
        SamplingParams(max_new_tokens=12, temperature=1.0, top_k=50, top_p=0.9, seed=n, ignore_eos=True)
        for n in range(4)
    ]
    together = engine(models("cpu")).generate(prompts[:4], params)
    alone = [
        engine(models("cpu"), SplitFuse(8)).generate([p], [s])[0] for p, s in zip(prompts[:4], params, strict=True)
    ]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    same_prompt = engine(models("cpu")).generate([prompts[0]] * 4, params)
    assert len({tuple(c.token_ids) for c in same_prompt}) == 4


def test_top_k_and_top_p_keep_the_likely():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log().repeat(4, 1)[:, [2, 0, 3, 1]]
    params = [
        SamplingParams(top_k=2),
        SamplingParams(top_p=0.69),
        SamplingParams(top_p=0.71),
        SamplingParams(top_k=3, top_p=0.5),
    ]
    kept = [sorted(row.exp()[row > -math.inf].tolist(), reverse=True) for row in keep_likely(logits, params)]
    expected = [[0.4, 0.3], [0.4, 0.3], [0.4, 0.3, 0.2], [0.4, 0.3]]
    assert [[round(p, 4) for p in row] for row in kept] == expected
    hot = [SamplingParams(temperature=5.0, top_k=1, seed=n) for n in range(4)]
    assert sample(logits, hot, [0, 1, 2, 3], reference).tolist() == [1, 1, 1, 1]


def test_a_stream_gives_tokens_as_they_come_and_closing_it_cancels(models, work):
    prompts, counts, expected = work
    made = engine(models("cpu"))
    longest = max(range(len(counts)), key=lambda n: counts[n])
    assert list(made.stream(prompts[longest], asked(counts)[longest])) == expected[longest]
    stream = made.stream(prompts[longest], asked(counts)[longest])
    assert [next(stream), next(stream)] == expected[longest][:2]
    stream.close()
    while made.has_work:
        made.step()
    assert_nothing_leaked(made)


def test_abort_in_any_state_frees_at_once(models, work):
    """Invariant 21."""
    prompts, counts, expected = work
    for steps in range(6):
        made = engine(models("cpu"), SplitFuse(16), max_num_seqs=4)
        requests = [made.add(p, s) for p, s in zip(prompts, asked(counts), strict=True)]
        for _ in range(steps):
            made.step()
        for request in requests[::2]:
            made.abort(request)
            made.kv.check()
        assert all(r.finish_reason for r in requests[::2])
        while made.has_work:
            made.step()
        assert [list(r.output) for r in requests[1::2]] == expected[1::2]
        assert_nothing_leaked(made)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], SamplingParams(), "expected at least one token, got none"),
        ([5, VOCABULARY], SamplingParams(), f"token ids must be 0..{VOCABULARY - 1}, got {VOCABULARY}"),
        ([-1], SamplingParams(), "got -1"),
        ([1] * 250, SamplingParams(max_new_tokens=7), "longer than the context of 256"),
        ([1] * 100, SamplingParams(max_new_tokens=62), "refused: it may need 161 slots of the KV cache"),
        ("text", SamplingParams(), "text needs the engine's tokenizer"),
        ([1], SamplingParams(stop=("x",)), "strings need the engine's tokenizer"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_request_that_can_never_run_is_refused_and_the_others_run(models, work, prompt, params, message):
    prompts, counts, expected = work
    made = engine(models("cpu"), num_blocks=10)
    with pytest.raises(ValueError, match=message):
        made.add(prompt, params)
    completions = made.generate([prompts[0], prompt, prompts[1]], [asked(counts)[0], params, asked(counts)[1]])
    assert [c.token_ids for c in completions] == [expected[0], [], expected[1]]
    assert message in completions[1].finish_reason
    assert_nothing_leaked(made)


def test_arguments_are_refused_by_name(models):
    with pytest.raises(ValueError, match="max_num_seqs: a step holds 4 tokens, too few for 6 sequences that decode"):
        engine(models("cpu"), SplitFuse(4))
    with pytest.raises(TypeError, match="prompt: expected text or a sequence of whole numbers"):
        engine(models("cpu")).add([1.5])
    with pytest.raises(ValueError, match="params: expected one for each of 2 prompts, got 1"):
        engine(models("cpu")).generate([[1], [2]], [SamplingParams()])
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SamplingParams(**wrong)
    with pytest.raises(ValueError, match="stop"):
        SamplingParams(stop="word")


def test_nan_weights_are_an_error_of_each_request_and_not_a_token(theirs, work):
    prompts, counts, _ = work
    model = Transformer.from_transformers(theirs)
    with torch.no_grad():
        model.layers[1].down.weight[3, 4] = math.nan
    made = engine(model)
    completions = made.generate(prompts, asked(counts))
    assert {c.finish_reason for c in completions} == {"error: the model's logits hold a NaN"}
    assert not any(c.token_ids for c in completions)
    assert_nothing_leaked(made)


def test_a_budget_that_the_running_decodes_fill_holds(models, work):
    """Invariant 15: with as many sequences as tokens in a step, prompts wait until a decode has ended."""
    prompts, counts, expected = work
    made = engine(models("cpu"), SplitFuse(3), max_num_seqs=3)
    made.times = []
    assert [c.token_ids for c in made.generate(prompts, asked(counts))] == expected
    assert max(t.num_tokens for t in made.times) == 3


@pytest.mark.parametrize("at", [1, 3, 8])
@pytest.mark.parametrize(
    "error", [RuntimeError("kernel"), torch.OutOfMemoryError("full"), KeyboardInterrupt()], ids=repr
)
def test_an_exception_in_mid_step_leaves_the_engine_usable(models, work, at, error, monkeypatch):
    """Invariant 26: what ran waits again with what it has, and ends with the same tokens."""
    prompts, counts, expected = work
    made = engine(models("cpu"))
    requests = [made.add(p, s) for p, s in zip(prompts, asked(counts), strict=True)]
    calls = itertools.count()
    attention = made.runner.cache.ops.decode_attention

    def failing(*arguments):
        if next(calls) == 3 * at:
            raise error
        attention(*arguments)

    monkeypatch.setattr(made.runner.cache.ops, "decode_attention", failing)
    with pytest.raises(type(error)):
        to_the_end(made)
    made.kv.check()
    assert made.kv.num_free_blocks == made.kv.num_blocks
    while made.has_work:
        made.step()
    assert [list(r.output) for r in requests] == expected
    assert_nothing_leaked(made)


@pytest.mark.parametrize("at", [1, 2, 3, 8])
@pytest.mark.parametrize("device", DEVICES)
def test_a_step_that_is_broken_off_before_its_launch_does_not_mix_up_the_hosts_buffers(
    models, work, at, device, monkeypatch
):
    """Host and device must agree on whose turn it is, and no late token may be taken for a new one."""
    prompts, counts, expected = work
    made = engine(models(device))
    requests = [made.add(p, s) for p, s in zip(prompts, asked(counts), strict=True)]
    fill, calls = runner.fill, itertools.count()

    def failing(*arguments):
        if next(calls) == at:
            raise KeyboardInterrupt
        fill(*arguments)

    monkeypatch.setattr(runner, "fill", failing)
    with pytest.raises(KeyboardInterrupt):
        to_the_end(made)
    while made.has_work:
        made.step()
    assert [list(r.output) for r in requests] == expected
    assert_nothing_leaked(made)


def test_ctrl_c_ends_a_call_of_generate_and_its_requests(models, work):
    prompts, _, _ = work
    made = engine(models("cpu"))
    timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        made.generate(prompts * 20, SamplingParams(max_new_tokens=150, ignore_eos=True))
    timer.join()
    assert_nothing_leaked(made)
    assert made.generate([prompts[0]], SamplingParams(max_new_tokens=2))[0].finish_reason == "length"


def test_a_policy_that_schedules_nothing_is_named(models):
    class Idle:
        max_num_batched_tokens = 64

        def schedule(self, state):
            from llmlab.batching import StepPlan

            return StepPlan()

    made = engine(models("cpu"), Idle())
    made.add([1, 2])
    with pytest.raises(RuntimeError, match="Idle schedules nothing, and 1 requests wait"):
        made.step()


@pytest.mark.gpu
def test_blocks_are_found_by_profiling_and_memory_stays_within(theirs):
    """Invariant 25."""
    model = Transformer.from_transformers(theirs).to("cuda")
    made = Engine(model, SplitFuse(256), max_num_seqs=32, memory_fraction=0.5)
    made.generate([[1] * 100] * 64, SamplingParams(max_new_tokens=50, ignore_eos=True))
    free, total = torch.cuda.mem_get_info()
    assert total - free <= 0.5 * total
    assert made.kv.num_blocks * 16 * 2 * 3 * 2 * 16 * 4 > 0.3 * total
    with pytest.raises(MemoryError, match=r"does not fit beside the model|bytes are left"):
        Engine(model, SplitFuse(256), max_num_seqs=32, memory_fraction=0.001)
