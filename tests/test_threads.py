"""Ranks as threads do what ranks as processes do."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from llmlab.parallel import Communicator, in_threads, launch, parallelize
from llmlab.parallel.plan import Block, Column, Row


def exchange(ranks):
    x = torch.arange(8.0).view(2, 4) * (ranks.rank + 1)
    pair = ranks.neighbours(2).all_reduce(torch.tensor([float(ranks.rank)]))
    found = [ranks.all_reduce(x), ranks.all_reduce(x, "max"), ranks.all_gather(x, 0), ranks.reduce_scatter(x), pair]
    return [t.tolist() for t in found], ranks.log


def test_every_collective_is_that_of_processes():
    in_processes = launch(lambda mesh: exchange(Communicator(mesh)), 4, device="cpu")
    assert in_threads(exchange, 4) == in_processes


def train(ranks, whole):
    mlp = deepcopy(whole)
    parallelize(mlp, ranks, {"0": Block(), "0.0": Column(), "0.2": Row()})
    mlp(torch.ones(2, 6, dtype=torch.float64, requires_grad=True)).square().sum().backward()
    return [parameter.grad for parameter in mlp.parameters()], [message.kind for message in ranks.log]


def test_layers_take_them_in_place_of_a_mesh():
    mlp = nn.Sequential(nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))).double()
    ((whole, _),) = in_threads(train, 1, mlp)
    for rank, (parts, log) in enumerate(in_threads(train, 3, mlp)):
        assert log == ["all_reduce", "all_reduce"]
        torch.testing.assert_close(parts[0], whole[0][4 * rank : 4 * rank + 4], rtol=0, atol=1e-12)
        torch.testing.assert_close(parts[2], whole[2][:, 4 * rank : 4 * rank + 4], rtol=0, atol=1e-12)
        torch.testing.assert_close(parts[3], whole[3], rtol=0, atol=1e-12)


def test_a_rank_may_write_over_its_input_behind_a_collective():
    """As between processes: the others have it by then, however long they take to read it."""

    def write_over(ranks):
        found = []
        for number in range(20):
            x = torch.full((100_000,), float(number))
            for collective in (ranks.all_reduce, ranks.all_gather, ranks.reduce_scatter):
                own = x.clone()
                whole = collective(own)
                own.fill_(-1)
                found.append(whole.unique().tolist())
        return found

    expected = [[factor * number] for number in range(20) for factor in (4.0, 1.0, 4.0)]
    assert in_threads(write_over, 4) == [expected] * 4


def test_the_first_error_ends_all():
    def fail(ranks):
        if ranks.rank == 1:
            raise KeyError("mine")
        ranks.all_reduce(torch.zeros(1))

    with pytest.raises(KeyError, match="mine"):
        in_threads(fail, 3)


def test_ranks_that_wait_for_nobody_are_told():
    with pytest.raises(TimeoutError, match=r"a rank waited 0\.2 s for the others"):
        in_threads(lambda ranks: ranks.all_reduce(torch.zeros(1)) if ranks.rank else None, 2, timeout=0.2)


@pytest.mark.parametrize(("size", "error"), [(0, ValueError), (2.5, TypeError)])
def test_wrong_sizes_are_named(size, error):
    with pytest.raises(error, match="size: expected a whole number"):
        in_threads(exchange, size)
