"""Students are measured digit by digit, and corrected without labels."""

from __future__ import annotations

import torch

from jobs.mnist.measure import Measuring

LABELS = torch.tensor([0, 3, 3, 7])


def measuring(frequency_of_3: float) -> Measuring:
    frequencies = torch.full((10,), (1 - frequency_of_3) / 9)
    frequencies[3] = frequency_of_3
    return Measuring(
        training_images=torch.empty(0), frequencies=frequencies, test_images=torch.empty(0), test_labels=LABELS
    )


def logits_of(digits: list[int], *, height: float = 4.0) -> torch.Tensor:
    return height * torch.nn.functional.one_hot(torch.tensor(digits), 10).float()


def test_an_error_counts_for_the_digit_that_the_image_shows() -> None:
    assert measuring(0.1).errors_by_digit(logits_of([0, 5, 3, 3])) == (0, 0, 0, 1, 0, 0, 0, 1, 0, 0)


def test_a_correction_gives_the_class_its_frequency_on_the_training_images() -> None:
    training_logits = logits_of([0, 1, 2, 4, 5, 6])
    correction = measuring(0.5).correction(logits_of([0, 3, 3, 7]), training_logits, [3])
    corrected = training_logits + torch.tensor(correction.bias[0]) * (torch.arange(10) == 3)
    torch.testing.assert_close(corrected.softmax(dim=1)[:, 3].mean(), torch.tensor(0.5), rtol=0, atol=1e-4)


def test_a_correction_mends_an_unseen_class_that_is_a_close_second() -> None:
    test_logits = logits_of([0, 5, 5, 7]) + logits_of([0, 3, 3, 7], height=3.0)
    training_logits = logits_of([0, 5, 5, 7]) + logits_of([0, 3, 3, 7], height=3.0)
    correction = measuring(0.5).correction(test_logits, training_logits, [3])
    assert sum(correction.errors_by_digit) == 0
