"""The blocked sweep gives what column-by-column OBS with an explicit inverse gives, whatever a column is made into."""

import pytest
import torch

from llmlab.obs import by_columns, inverse_factor, obs_sweep, reconstruction_error


def correlated(columns, samples=400, seed=0, dtype=torch.float64):
    """Inputs [samples, columns] whose channels share directions, and differ in size by a factor of 30."""
    torch.manual_seed(seed)
    mixing = torch.randn(columns, columns, dtype=dtype) * 0.4 + torch.eye(columns, dtype=dtype)
    sizes = torch.logspace(-1, 0.5, columns, dtype=dtype)[torch.randperm(columns)]
    return torch.randn(samples, columns, dtype=dtype) @ mixing * sizes


def naive_obs(weight, hessian, damp, settle):
    """One column at a time over the whole matrix; the free columns' inverse is found anew for each."""
    w, n = weight.clone(), weight.shape[1]
    H = hessian + damp * hessian.diagonal().mean() * torch.eye(n, dtype=hessian.dtype)
    for j in range(n):
        inverse = torch.linalg.inv(H[j:, j:])
        settled = settle(w, j, inverse.diagonal())
        w[:, j + 1 :] -= torch.outer((w[:, j] - settled) / inverse[0, 0], inverse[0, 1:])
        w[:, j] = settled
    return w


def to_halves(free, diagonal, column):
    return (free[:, 0] * 2).round() / 2


@pytest.mark.parametrize("block_size", [1, 7, 16, 40, 64])
def test_the_blocked_sweep_is_column_by_column_obs(block_size):
    x = correlated(40)
    hessian, weight = x.T @ x / len(x), torch.randn(12, 40, dtype=torch.float64)
    before = weight.clone()
    got = obs_sweep(weight, inverse_factor(hessian, 0.05), by_columns(to_halves), block_size)
    expected = naive_obs(weight, hessian, 0.05, lambda w, j, _: (w[:, j] * 2).round() / 2)
    assert torch.equal(weight, before)
    assert torch.equal(got, expected)  # both lie on the grid, so equal to rounding means equal


def test_a_pruning_step_sees_the_free_columns_and_their_inverse():
    """Two of each four entries go, by w² / [H⁻¹]_jj as they stand when their four columns are reached: SparseGPT's 2:4."""
    x = correlated(24, seed=1)
    hessian, weight = x.T @ x / len(x), torch.randn(6, 24, dtype=torch.float64)
    gone = {}

    def ours(free, diagonal, column):
        if column % 4 == 0:
            gone[column] = (free[:, :4] / diagonal[:4]).abs().argsort(1)[:, :2]
        mine = (gone[column - column % 4] == column % 4).any(1)
        return torch.where(mine, 0.0, free[:, 0])

    theirs = {}

    def plain(w, j, inverse_diagonal):
        if j % 4 == 0:
            # U_jj² is the inverse's entry once the columns before j are settled, for each of the four
            H = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24, dtype=torch.float64)
            spread = torch.stack([torch.linalg.inv(H[k:, k:])[0, 0] for k in range(j, j + 4)])
            theirs[j] = (w[:, j : j + 4] ** 2 / spread).argsort(1)[:, :2]
        return torch.where((theirs[j - j % 4] == j % 4).any(1), 0.0, w[:, j])

    got = obs_sweep(weight, inverse_factor(hessian, 0.01), by_columns(ours), 8)
    expected = naive_obs(weight, hessian, 0.01, plain)
    assert ((got == 0).view(6, 6, 4).sum(-1) == 2).all()
    assert torch.allclose(got, expected, atol=1e-10)


def test_the_factor_gives_the_damped_inverse():
    x = correlated(30, seed=2)
    hessian = x.T @ x / len(x)
    U = inverse_factor(hessian, 0.1)
    damped = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(30, dtype=torch.float64)
    assert torch.equal(U, U.triu())
    assert torch.allclose(U.T @ U @ damped, torch.eye(30, dtype=torch.float64), atol=1e-9)


def test_independent_inputs_leave_every_other_column_alone():
    weight = torch.randn(9, 50)
    factor = inverse_factor(3.7 * torch.eye(50))
    got = obs_sweep(weight, factor, by_columns(lambda free, *_: (free[:, 0] * 3).round() / 3), 16)
    assert torch.equal(got, (weight * 3).round() / 3)


@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_dead_columns_are_settled_and_change_nothing(damp):
    x = correlated(20, seed=3)
    x[:, [4, 11]] = 0
    hessian, weight = x.T @ x / len(x), torch.randn(5, 20, dtype=torch.float64)
    living = [j for j in range(20) if j not in (4, 11)]
    got = obs_sweep(weight, inverse_factor(hessian, damp), by_columns(to_halves))
    assert torch.equal(got[:, [4, 11]], (weight[:, [4, 11]] * 2).round() / 2)
    share = damp * float(hessian.diagonal().mean() / hessian[living][:, living].diagonal().mean())
    alone = obs_sweep(weight[:, living], inverse_factor(hessian[living][:, living], share), by_columns(to_halves))
    assert torch.equal(got[:, living], alone)


def test_the_sweep_loses_less_than_rounding():
    for seed in range(5):
        x = correlated(64, seed=seed)
        hessian, weight = x.T @ x / len(x), torch.randn(32, 64, dtype=torch.float64)
        swept = obs_sweep(weight, inverse_factor(hessian), by_columns(to_halves), 16)
        rounded = (weight * 2).round() / 2
        assert ((weight - swept) @ x.T).norm() < 0.8 * ((weight - rounded) @ x.T).norm()


def test_the_error_is_that_of_the_outputs():
    x, difference = correlated(20, seed=4), torch.randn(7, 20, dtype=torch.float64)
    expected = ((x @ difference.T) ** 2).mean(0)
    assert torch.allclose(reconstruction_error(difference, x.T @ x / len(x)), expected)


@pytest.mark.parametrize(
    ("hessian", "damp", "says"),
    [
        (torch.ones(3, 4), 0.01, "square"),
        (torch.full((3, 3), float("nan")), 0.01, "finite"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 0.0, "positive definite"),
        (torch.eye(3), -1.0, "damp"),
        (torch.eye(3), float("nan"), "damp"),
    ],
)
def test_a_wrong_hessian_is_refused(hessian, damp, says):
    with pytest.raises(ValueError, match=says):
        inverse_factor(hessian, damp)


@pytest.mark.parametrize(
    ("weight", "columns", "block_size", "says"),
    [
        (torch.ones(2, 4), 3, 8, "factor"),
        (torch.ones(4), 4, 8, "factor"),
        (torch.full((2, 3), float("inf")), 3, 8, "weight"),
        (torch.ones(2, 3), 3, 0, "block_size"),
    ],
)
def test_a_wrong_sweep_is_refused(weight, columns, block_size, says):
    with pytest.raises(ValueError, match=says):
        obs_sweep(weight, torch.eye(columns), by_columns(to_halves), block_size)
