"""Which rows a loss counts: weights, masks, labels that are ignored, and padded sequences."""

import dataclasses

import pytest
import torch
from torch.nn import functional

from kdcache.codecs import Decoder, codec_for, parameters_to
from kdcache.documents import Codes, TopK
from kdcache.errors import OptionError, ShapeError
from kdcache.losses import DistillationLoss, distillation_loss
from kdcache.losses.divergences import DIVERGENCES
from kdcache.soft_targets import MEANS, SoftTargets

GENERATOR = torch.Generator().manual_seed(0)
STUDENT = torch.randn(12, 5, generator=GENERATOR, dtype=torch.float64) * 3
TEACHER = torch.randn(12, 2, 5, generator=GENERATOR, dtype=torch.float64) * 3
LABELS = torch.arange(12) % 5
WEIGHTS = torch.tensor([0.5, 2, 1, 0, 3, 1, 1, 0.25, 1, 4, 1, 1], dtype=torch.float64)
MASK = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0], dtype=torch.bool)
KEPT = [0, 1, 3, 4, 5, 7, 8, 9, 10]
IGNORING = LABELS.masked_fill(torch.arange(12) % 3 == 1, -100)
LABELLED = [0, 2, 3, 5, 6, 8, 9, 11]
NAN = float("nan")
NUM_ROWS = torch.tensor([4, 1, 3])
PRESENT = [0, 1, 2, 3, 4, 8, 9, 10]  # of three examples of four positions
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def loss(student=STUDENT, soft_targets=TEACHER, labels=LABELS, temperature=2.0, **options):
    return distillation_loss(student, soft_targets, labels, temperature=temperature, soft_weight=0.7, **options)


def loss_and_gradient(student=STUDENT, soft_targets=TEACHER, labels=LABELS, **options):
    student = student.clone().requires_grad_()
    found = loss(student, soft_targets, labels, **options)
    return found.detach(), torch.autograd.grad(found.sum(), student)[0]


def coded(rows, **options):
    codec = codec_for(Codes(dtype="uint16"), 5)
    decoder = Decoder(codec, parameters_to(codec.fit(TEACHER[:, 0]), "cpu"))
    return SoftTargets((decoder.encode(TEACHER[rows, 0]),), (decoder,), ("a",), **options)


def padded(student=STUDENT, **options):
    """Three examples of four positions, of which 4, 1 and 3 have soft targets."""
    return loss(student.reshape(3, 4, 5), coded(PRESENT, num_rows=NUM_ROWS), LABELS.reshape(3, 4), **options)


# --- weights


@every_divergence
def test_a_mean_is_weighted(divergence):
    rows = loss(divergence=divergence, reduction="none")
    found = loss(divergence=divergence, row_weights=WEIGHTS)
    torch.testing.assert_close(found, (WEIGHTS * rows).sum() / WEIGHTS.sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("reduction", "reduce"), [("sum", torch.sum), ("none", torch.clone)])
def test_sums_and_rows_are_weighted_and_not_divided(reduction, reduce):
    found = loss(row_weights=WEIGHTS, reduction=reduction)
    torch.testing.assert_close(found, reduce(WEIGHTS * loss(reduction="none")), rtol=1e-12, atol=0)


def test_equal_weights_change_nothing():
    torch.testing.assert_close(loss(row_weights=torch.full((12,), 3.0)), loss(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("weight", [-1.0, NAN, float("inf")])
def test_what_is_no_weight_is_refused(weight):
    with pytest.raises(OptionError, match="must be finite and at least 0"):
        loss(row_weights=WEIGHTS.index_fill(0, torch.tensor([2]), weight))


def test_weights_of_another_shape_are_refused_with_both():
    with pytest.raises(ShapeError, match=r"shape \(12,\) of the student's rows, got torch.float64 of shape \(11,\)"):
        loss(row_weights=WEIGHTS[1:])


# --- masks


@every_divergence
@every_reduction
def test_a_mask_gives_the_loss_of_the_rows_it_keeps(divergence, reduction):
    found = loss(mask=MASK, divergence=divergence, reduction=reduction)
    expected = loss(STUDENT[KEPT], TEACHER[KEPT], LABELS[KEPT], divergence=divergence, reduction=reduction)
    torch.testing.assert_close(found[MASK] if reduction == "none" else found, expected, rtol=1e-12, atol=0)


@every_divergence
@every_reduction
@pytest.mark.parametrize("left_out", [{"mask": MASK}, {"row_weights": MASK.double()}], ids=["mask", "weights of 0"])
def test_rows_that_are_left_out_add_exactly_nothing_even_where_all_is_nan(divergence, reduction, left_out):
    student, teacher = (values.clone() for values in (STUDENT, TEACHER))
    student[~MASK], teacher[~MASK] = NAN, NAN
    labels = LABELS.masked_fill(~MASK, 77)
    found = loss_and_gradient(student, teacher, labels, divergence=divergence, reduction=reduction, **left_out)
    expected = loss_and_gradient(divergence=divergence, reduction=reduction, **left_out)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert found[1][~MASK].eq(0).all()


@every_divergence
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_batch_that_is_left_out_whole_has_no_loss_and_no_gradient(divergence, reduction):
    found, gradient = loss_and_gradient(
        torch.full_like(STUDENT, NAN), divergence=divergence, reduction=reduction, mask=torch.zeros(12).bool()
    )
    assert (found.item(), gradient.abs().sum().item()) == (0.0, 0.0)


def test_rows_that_are_not_available_are_left_out_by_their_own_mask():
    soft_targets = coded(range(12), available=MASK)
    torch.testing.assert_close(
        loss(soft_targets=soft_targets, mask=MASK), loss(soft_targets=coded(range(12)), mask=MASK)
    )


@pytest.mark.parametrize("mask", [MASK[1:], MASK.long(), MASK.reshape(3, 4)])
def test_another_mask_is_refused_with_both_shapes(mask):
    with pytest.raises(ShapeError, match=r"`mask` must be of bool with the shape \(12,\) of the student's rows, True"):
        loss(mask=mask)


# --- labels that are ignored


@every_reduction
def test_labels_alone_are_the_cross_entropy_of_torch(reduction):
    options = {"temperature": 2.0, "soft_weight": 0.0, "reduction": reduction}
    found = distillation_loss(STUDENT, TEACHER, IGNORING, **options)
    expected = functional.cross_entropy(STUDENT, IGNORING, reduction=reduction)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@every_divergence
def test_a_row_without_a_label_keeps_its_soft_term(divergence):
    options = {"temperature": 2.0, "divergence": divergence}
    found = loss(labels=IGNORING, divergence=divergence)
    soft = distillation_loss(STUDENT, TEACHER, soft_weight=1.0, **options)
    hard = distillation_loss(STUDENT[LABELLED], TEACHER[LABELLED], LABELS[LABELLED], soft_weight=0.0, **options)
    torch.testing.assert_close(found, 0.7 * soft + 0.3 * hard, rtol=1e-12, atol=0)


def test_a_mask_of_labels_leaves_rows_without_one_out():
    found = loss(labels=IGNORING, mask=IGNORING != -100)
    torch.testing.assert_close(found, loss(STUDENT[LABELLED], TEACHER[LABELLED], LABELS[LABELLED]))


def test_another_index_may_be_ignored():
    found = loss(labels=LABELS, ignore_index=4)
    torch.testing.assert_close(found, loss(labels=LABELS.masked_fill(LABELS == 4, -100)))


def test_a_batch_without_any_label_has_its_soft_term():
    found = loss(labels=torch.full((12,), -100))
    torch.testing.assert_close(found, 0.7 * distillation_loss(STUDENT, TEACHER, temperature=2.0, soft_weight=1.0))


def test_a_masked_first_class_harms_no_row_without_a_label():
    labels = IGNORING.masked_fill(IGNORING == 0, 1)
    found = loss(STUDENT.index_fill(1, torch.tensor([0]), -torch.inf), labels=labels, divergence="reverse-kl")
    assert found.isfinite()


# --- sequences


@every_divergence
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_padding_is_left_out(divergence, reduction):
    found = padded(divergence=divergence, reduction=reduction)
    expected = loss(STUDENT[PRESENT], coded(PRESENT), LABELS[PRESENT], divergence=divergence, reduction=reduction)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_losses_of_positions_keep_their_shape_with_0_in_padding():
    found = padded(reduction="none")
    assert found.shape == (3, 4)
    assert found.flatten().nonzero()[:, 0].tolist() == PRESENT
    expected = loss(STUDENT[PRESENT], coded(PRESENT), LABELS[PRESENT], reduction="none")
    torch.testing.assert_close(found.flatten()[PRESENT], expected, rtol=1e-12, atol=0)


def test_padding_may_hold_anything():
    student = STUDENT.clone()
    student[[5, 6, 7, 11]] = NAN
    assert torch.equal(padded(student), padded())


def test_a_mask_leaves_out_further_positions():
    found = padded(mask=MASK.reshape(3, 4), row_weights=WEIGHTS.reshape(3, 4))
    kept = [0, 1, 4, 8, 9, 10]
    torch.testing.assert_close(found, loss(STUDENT[kept], coded(kept), LABELS[kept], row_weights=WEIGHTS[kept]))


def test_labels_alone_leave_the_same_padding_out():
    options = {"temperature": 2.0, "soft_weight": 0.0}
    soft_targets = coded(PRESENT, num_rows=NUM_ROWS)
    found = distillation_loss(STUDENT.reshape(3, 4, 5), soft_targets, LABELS.reshape(3, 4), **options)
    torch.testing.assert_close(found, functional.cross_entropy(STUDENT[PRESENT], LABELS[PRESENT]))


@pytest.mark.parametrize("teacher", [TEACHER, TEACHER[:, 0]], ids=["two teachers", "one teacher"])
def test_plain_logits_of_sequences_give_the_loss_of_their_rows(teacher):
    sequences = teacher.reshape(3, 4, *teacher.shape[1:])
    found = loss(STUDENT.reshape(3, 4, 5), sequences, LABELS.reshape(3, 4), mean="arithmetic")
    torch.testing.assert_close(found, loss(soft_targets=teacher, mean="arithmetic"), rtol=1e-12, atol=0)


def test_sequences_of_one_row_need_no_count():
    found = loss(STUDENT[:, None], coded(range(12)), LABELS[:, None])
    torch.testing.assert_close(found, loss(soft_targets=coded(range(12))), rtol=1e-12, atol=0)


def test_a_cut_example_is_refused_with_its_number():
    with pytest.raises(ShapeError, match="gives 3 positions of each example, and example 0 of the batch has 4 cached"):
        loss(STUDENT[:9].reshape(3, 3, 5), coded(PRESENT, num_rows=NUM_ROWS), LABELS[:9].reshape(3, 3))


def test_another_number_of_examples_is_refused_with_both():
    with pytest.raises(ShapeError, match="gives 4 examples of 3 positions, the soft targets are of 3 examples"):
        loss(STUDENT.reshape(4, 3, 5), coded(PRESENT, num_rows=NUM_ROWS), LABELS.reshape(4, 3))


def test_soft_targets_that_do_not_say_whose_they_are_are_refused():
    with pytest.raises(ShapeError, match="these 8 rows of soft targets do not say how many each example has"):
        loss(STUDENT.reshape(3, 4, 5), coded(PRESENT), LABELS.reshape(3, 4))


def test_a_count_of_other_rows_is_refused_with_both():
    with pytest.raises(ShapeError, match="`num_rows` counts 8 rows, the soft targets are 9"):
        loss(STUDENT.reshape(3, 4, 5), coded(range(9), num_rows=NUM_ROWS), LABELS.reshape(3, 4))


def test_sequences_of_other_sizes_are_refused_with_both():
    with pytest.raises(
        ShapeError, match="3 examples of 4 rows of 5 classes, the soft targets are 4 examples of 3 rows"
    ):
        loss(STUDENT.reshape(3, 4, 5), TEACHER.reshape(4, 3, 2, 5), LABELS.reshape(3, 4))


def test_flat_labels_of_sequences_are_refused():
    with pytest.raises(ShapeError, match="3 examples of 4 rows of student logits need as many integer labels, got"):
        loss(STUDENT.reshape(3, 4, 5), TEACHER.reshape(3, 4, 2, 5), LABELS)


# --- the same by every way


WAYS = {
    "plain": {},
    "weights": {"row_weights": WEIGHTS},
    "mask": {"mask": MASK},
    "both": {"row_weights": WEIGHTS, "mask": MASK},
}
every_way = pytest.mark.parametrize("way", WAYS)


def in_shape(shape, options):
    """The batch, and what belongs to its rows, as rows or as sequences."""
    return (
        (STUDENT.reshape(*shape, 5), TEACHER.reshape(*shape, 2, 5), IGNORING.reshape(shape)),
        {name: values.reshape(shape) for name, values in options.items()},
    )


@every_divergence
@pytest.mark.parametrize("mean", MEANS)
@every_way
@pytest.mark.parametrize("shape", [(12,), (3, 4)], ids=["rows", "sequences"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 4.0])
def test_values_and_gradients_are_those_of_plain_autograd(divergence, mean, way, shape, temperature, monkeypatch):
    batch, options = in_shape(shape, WAYS[way])
    options |= {"divergence": divergence, "mean": mean, "temperature": temperature, "beta": 0.3}
    found = loss_and_gradient(*batch, **options)
    monkeypatch.setattr("kdcache.losses.row_losses.is_followed", lambda: True)
    expected = loss_and_gradient(*batch, **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@every_divergence
@pytest.mark.parametrize("mean", MEANS)
@every_way
def test_gradients_are_those_of_finite_differences(divergence, mean, way):
    student = STUDENT.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda logits: loss(logits, labels=IGNORING, divergence=divergence, mean=mean, **WAYS[way]), student
    )


@every_divergence
def test_gradients_are_differentiated_again(divergence):
    student = STUDENT[:4].clone().requires_grad_()
    rest = {"mask": MASK[:4], "row_weights": WEIGHTS[:4], "divergence": divergence}
    assert torch.autograd.gradgradcheck(lambda logits: loss(logits, TEACHER[:4], IGNORING[:4], **rest), student)


@every_divergence
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when its rules for jvp are first imported
def test_functional_transforms_see_through_masks(divergence):
    options = {"divergence": divergence, "mask": MASK, "row_weights": WEIGHTS}
    _, expected = loss_and_gradient(labels=IGNORING, **options)
    found = torch.func.grad(lambda logits: loss(logits, labels=IGNORING, **options))(STUDENT)
    torch.testing.assert_close(found, expected)


@every_divergence
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when its rules for jvp are first imported
def test_forward_mode_sees_through_the_loss(divergence):
    student = STUDENT.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda logits: loss(logits, divergence=divergence), student, check_forward_ad=True, check_backward_ad=False
    )


@every_divergence
def test_masked_padded_sequences_compile(divergence):
    soft_targets = coded(PRESENT, num_rows=NUM_ROWS)
    options = {"divergence": divergence, "mask": MASK.reshape(3, 4)}

    def whole(student, labels):
        return loss(student, soft_targets, labels, **options)

    torch.compiler.reset()
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    batch = STUDENT.float().reshape(3, 4, 5), IGNORING.reshape(3, 4)
    torch.testing.assert_close(compiled(*batch), whole(*batch))


def test_the_module_takes_masks_and_weights():
    module = DistillationLoss(temperature=2.0, soft_weight=0.7, divergence="jensen-shannon", beta=0.3, ignore_index=4)
    found = module(STUDENT, TEACHER, LABELS, mask=MASK, row_weights=WEIGHTS)
    expected = loss(divergence="jensen-shannon", beta=0.3, ignore_index=4, mask=MASK, row_weights=WEIGHTS)
    assert torch.equal(found, expected)


# --- sampled soft targets


@pytest.mark.parametrize("divergence", ["reverse-kl", "jensen-shannon"])
def test_sampled_soft_targets_are_refused_where_every_class_is_needed(divergence):
    codec = codec_for(TopK(k=1, tail="samples", num_samples=2), 5)
    decoder = Decoder(codec, parameters_to(codec.fit(TEACHER[:, 0]), "cpu"))
    soft_targets = SoftTargets((decoder.encode(TEACHER[:, 0]),), (decoder,), ("a",))
    with pytest.raises(OptionError, match=f"divergence='{divergence}' needs the probability of every class.*sampled"):
        loss(soft_targets=soft_targets, divergence=divergence)


def test_padded_sampled_soft_targets_give_the_loss_of_their_rows():
    codec = codec_for(TopK(k=1, tail="samples", num_samples=2), 5)
    decoder = Decoder(codec, parameters_to(codec.fit(TEACHER[:, 0]), "cpu"))
    soft_targets = SoftTargets((decoder.encode(TEACHER[PRESENT, 0]),), (decoder,), ("a",))
    sequences = dataclasses.replace(soft_targets, num_rows=NUM_ROWS)
    found = loss(STUDENT.reshape(3, 4, 5), sequences, LABELS.reshape(3, 4))
    torch.testing.assert_close(found, loss(STUDENT[PRESENT], soft_targets, LABELS[PRESENT]))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_scalers_slope_finds_the_small_slopes_of_a_float16_student(temperature):
    """Divided by the rows, most slopes are below what float16 holds; a scaler multiplies them by 65,536."""
    generator = torch.Generator().manual_seed(0)
    teacher = 4 * torch.randn(64, 8000, generator=generator)
    student = (4 * torch.randn(64, 8000, generator=generator)).half().requires_grad_()
    (65536 * distillation_loss(student, teacher, temperature=temperature, soft_weight=1.0)).backward()
    wide = student.detach().double().requires_grad_()
    log_student = torch.log_softmax(wide / temperature, dim=1)
    soft_targets = torch.softmax(teacher.double() / temperature, dim=1)
    (65536 * temperature**2 * torch.nn.functional.kl_div(log_student, soft_targets, reduction="batchmean")).backward()
    error = (student.grad.double() - wide.grad).norm() / wide.grad.norm()
    assert error < 1e-3


def test_another_default_device_changes_nothing():
    student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]])
    expected = distillation_loss(student, teacher, temperature=3.0, soft_weight=1.0)
    torch.set_default_device("meta")
    try:
        found = distillation_loss(student, teacher.double().float(), temperature=3.0, soft_weight=1.0)
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, expected)
