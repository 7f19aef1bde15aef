"""Counting tensors: each storage once, while it is alive."""

import torch

from llmlab.accounting import SavedForBackward, TensorAccounting, storage_bytes


def test_views_count_once():
    base = torch.zeros(10, 10)
    assert storage_bytes([base, base.t(), base[3:]]) == 400


def test_live_and_peak_bytes():
    with TensorAccounting() as accounting:
        kept = torch.ones(1000)
        temporary = kept * 2
        assert accounting.live_bytes == 8000
        del temporary
        assert accounting.live_bytes == 4000
        smaller = kept[:10].clone()
        assert accounting.live_bytes == 4040
    assert accounting.peak_bytes == 8000
    assert smaller.numel() == 10


def test_tensors_from_before_count_when_told():
    before = torch.zeros(100)
    with TensorAccounting() as accounting:
        accounting.count([before, before.view(10, 10)])
        assert accounting.live_bytes == 400


def test_saved_tensors_without_parameters():
    weight = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(8, 4)
    with SavedForBackward([weight]) as saved:
        (x @ weight).relu().sum()
    assert saved.num_bytes == 8 * 4 * 4 + 8 * 4 * 4  # the product's input and relu's output
