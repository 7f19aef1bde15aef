"""The optimal-brain-surgeon sweep that GPTQ and SparseGPT share: settle a matrix's columns one after another, and let
the columns that are still free make up for what each loses.

Of a layer W [rows, columns] with inputs X [n, columns] the loss is ‖X (W - Q)ᵀ‖² = n Σ_r (w_r - q_r) H (w_r - q_r)ᵀ with
H = Xᵀ X / n. Rows do not meet. When column j becomes q, the best that the free columns F can do is

    w_F -= (w_j - q) / [H_F⁻¹]_jj [H_F⁻¹]_jF = (w_j - q) / U_jj U_jF,     H⁻¹ = Uᵀ U with U upper triangular:

row j of the one factor holds what the inverse of the free columns' H would say at step j (Frantar et al. 2022).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# What a column becomes [rows]: of the block's free columns as they stand [rows, free], of which it is the first, their
# entries of U's diagonal [free], and its number.
ColumnStep = Callable[[Tensor, Tensor, int], Tensor]
# A block's settled columns and their errors (w - q) / U_jj, both [rows, b]: of the columns as they stand [rows, b],
# their part of U [b, b], and the number of the first.
BlockStep = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def inverse_factor(hessian: Tensor, damp: float = 0.01) -> Tensor:
    """The upper triangular U [columns, columns] with Uᵀ U = (H + damp mean(diag H) I)⁻¹, in at least fp32.

    hessian: Xᵀ X / n [columns, columns]; its scale does not matter to the sweep. damp: a share of the mean diagonal. A
    dead column, whose input is always 0, is tied to no other, so it takes no part in what the others make up for.
    One Cholesky factorisation from the last column to the first and one triangular inverse: no inverse is formed.
    Raises ValueError for a matrix that is not square, finite and, once damped, positive definite.
    """
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1]:
        raise ValueError(f"hessian: expected a square matrix, got shape {list(hessian.shape)}")
    if not damp >= 0:
        raise ValueError(f"damp: expected a share of the diagonal, at least 0, got {damp!r}")
    H = hessian.to(torch.promote_types(hessian.dtype, torch.float32), copy=True)
    if not torch.isfinite(H).all():
        raise ValueError("hessian: expected finite entries, got NaN or infinity among them")
    diagonal = H.diagonal()
    diagonal += damp * diagonal.mean()
    diagonal[diagonal == 0] = 1.0
    backwards, failed = torch.linalg.cholesky_ex(H.flip(0, 1))
    if int(failed):
        raise ValueError(f"hessian: expected a positive definite matrix with damp {damp}; take a larger damp")
    unit = torch.eye(len(H), dtype=H.dtype, device=H.device)
    factor: Tensor = torch.linalg.solve_triangular(backwards.flip(0, 1), unit, upper=True)
    return factor


def obs_sweep(weight: Tensor, factor: Tensor, settle: BlockStep, block_size: int = 128) -> Tensor:
    """Settle the columns of a matrix from the first to the last; the settled matrix [rows, columns], in factor's dtype.

    W_later -= E_block U[block, later] after each block, with E the errors (w - q) / U_jj: the columns outside a block
    are read and written once a block, not once a column (Frantar et al. 2023, arXiv:2210.17323, section 3.3).

    weight: [rows, columns], left as it is. factor: U of ``inverse_factor`` [columns, columns]. settle: see
    ``by_columns``. block_size: columns in a block.
    Raises ValueError where the factor's shape is another, a weight is not finite, or the block is empty.
    """
    columns = weight.shape[-1]
    if weight.dim() != 2 or factor.shape != (columns, columns):
        raise ValueError(
            f"factor: expected {[columns, columns]} for a weight {list(weight.shape)}, got {list(factor.shape)}"
        )
    if block_size < 1:
        raise ValueError(f"block_size: expected at least one column, got {block_size!r}")
    if not torch.isfinite(weight).all():
        raise ValueError("weight: expected finite entries, got NaN or infinity among them")
    free = weight.to(factor.dtype, copy=True)
    for first in range(0, columns, block_size):
        last = min(first + block_size, columns)
        settled, errors = settle(free[:, first:last], factor[first:last, first:last], first)
        free[:, first:last] = settled
        free[:, last:].addmm_(errors, factor[first:last, last:], alpha=-1)
    return free


def by_columns(step: ColumnStep) -> BlockStep:
    """Settle a block column by column, each passing its error on to those behind it in the block.

    step(free, diagonal, column): what the first of the free columns [rows, free] becomes. GPTQ rounds it; SparseGPT
    looks at several of them, by w² / U_jj², when it chooses which entries go.
    """

    def settle(block: Tensor, factor: Tensor, first: int) -> tuple[Tensor, Tensor]:
        free = block.T.contiguous()  # columns as rows: each is read and written whole
        errors, diagonal = torch.empty_like(free), factor.diagonal()
        for j in range(len(free)):
            settled = step(free[j:].T, diagonal[j:], first + j)
            torch.div(free[j] - settled, diagonal[j], out=errors[j])
            free[j] = settled
            free[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
        return free.T, errors.T

    return settle


def reconstruction_error(difference: Tensor, hessian: Tensor) -> Tensor:
    """What a change of the weights does to the outputs, a row: Σ_ij d_i H_ij d_j = ‖X d_rᵀ‖² / n, [rows].

    difference: W - Q [rows, columns]; hessian: Xᵀ X / n [columns, columns].
    """
    return ((difference @ hessian.to(difference.dtype)) * difference).sum(-1)
