"""Identity by retrieval: average precision and rank, against a ranking written out and against torchmetrics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.retrieval import retrieval_average_precision, retrieval_reciprocal_rank

from ether_diffusion.metrics.retrieval import average_precision, rank, retrieved


def scores(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(6, 4, generator=generator), torch.rand(6, 30, generator=generator)


@pytest.mark.parametrize("seed", range(3))
def test_both_are_torchmetrics(seed: int) -> None:
    near, far = scores(seed)
    belongs = torch.tensor([True] * 4 + [False] * 30)
    rows = [torch.cat([one, other]) for one, other in zip(near, far, strict=True)]
    theirs = [float(retrieval_average_precision(row, belongs)) for row in rows]
    assert average_precision(near, far).tolist() == pytest.approx(theirs, rel=1e-6)
    first = [1 / float(retrieval_reciprocal_rank(row, belongs)) for row in rows]
    assert rank(near, far).tolist() == pytest.approx(first, rel=1e-6)


def test_all_photos_first_is_one_and_a_tie_counts_against_the_image() -> None:
    near, far = torch.tensor([[0.9, 0.8]]), torch.tensor([[0.7, 0.1, 0.0]])
    assert average_precision(near, far).tolist() == [1.0]
    assert rank(near, far).tolist() == [1.0]
    assert average_precision(torch.tensor([[0.7]]), far).tolist() == [0.5]


def test_an_image_of_the_subject_ranks_its_photos_before_others() -> None:
    photos, others = torch.eye(6)[:2], torch.eye(6)[2:]
    images = F.normalize(torch.tensor([[1.0, 0.9, 0, 0, 0, 0], [0, 0, 1.0, 0.9, 0.1, 0.1]]))
    precision = retrieved("retrieval", ["a", "b"], images, photos, others)
    assert precision.rows == ("a", "b")
    assert precision.values[0].item() == 1
    assert precision.values[1].item() < 0.5
    assert retrieved("rank", ["a", "b"], images, photos, others).values.flatten().tolist() == [1, 5]
