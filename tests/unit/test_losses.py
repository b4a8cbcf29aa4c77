"""Distillation losses: the paper's gradients, sound at any temperature, with errors that name both sides."""

import math

import pytest
import torch
from torch.nn import functional

from kdcache.codecs import Decoder, codec_for, parameters_to
from kdcache.documents import Codes, Lossless, TopK
from kdcache.errors import MergedCacheError, OptionError, ShapeError, TemperatureError, UnknownTeacherError
from kdcache.losses import (
    DistillationLoss,
    distillation_loss,
    forward_kl,
    jensen_shannon,
    logit_matching_loss,
    logits_to_match,
    reverse_kl,
    soft_cross_entropy,
)
from kdcache.soft_targets import SoftTargets, log_mean_probabilities

GENERATOR = torch.Generator().manual_seed(0)
STUDENT = torch.randn(7, 5, generator=GENERATOR, dtype=torch.float64) * 3
TEACHER = torch.randn(7, 5, generator=GENERATOR, dtype=torch.float64) * 3
MEMBERS = torch.randn(7, 3, 5, generator=GENERATOR, dtype=torch.float64) * 3
LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 1])
DIVERGENCES = ["forward-kl", "cross-entropy", "reverse-kl", "jensen-shannon", "logit-matching"]
MEANS = ["geometric", "arithmetic", "tempered-arithmetic"]


def softmax(logits, temperature=1.0):
    return torch.softmax(logits / temperature, dim=1)


def gradient(loss, student=STUDENT):
    student = student.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(student), student)
    return slope


def soft_gradient(student, teacher, temperature, divergence="forward-kl", mean="geometric"):
    loss = DistillationLoss(temperature=temperature, soft_weight=1.0, divergence=divergence, mean=mean, reduction="sum")
    return gradient(lambda logits: loss(logits, teacher), student)


def cached(logits, **options):
    decoder = Decoder(codec_for(Lossless(), logits.shape[-1]), {})
    codes = tuple(logits.float().unbind(1))
    return SoftTargets(codes, (decoder,) * len(codes), options.pop("names", ("a", "b", "c")), **options)


# --- values


def test_forward_kl_is_scaled_by_the_squared_temperature():
    p, q = softmax(TEACHER, 4.0), softmax(STUDENT, 4.0)
    expected = 16 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(distillation_loss(STUDENT, TEACHER, temperature=4.0, soft_weight=1.0), expected)


def test_cross_entropy_is_scaled_by_the_squared_temperature():
    expected = -16 * (softmax(TEACHER, 4.0) * softmax(STUDENT, 4.0).log()).sum(1).mean()
    found = distillation_loss(STUDENT, TEACHER, temperature=4.0, soft_weight=1.0, divergence="cross-entropy")
    torch.testing.assert_close(found, expected)


def test_logit_matching_is_half_the_mean_square_of_zero_meaned_logits():
    centred = (STUDENT - STUDENT.mean(1, keepdim=True)) - (TEACHER - TEACHER.mean(1, keepdim=True))
    found = distillation_loss(STUDENT, TEACHER, temperature=4.0, soft_weight=1.0, divergence="logit-matching")
    torch.testing.assert_close(found, (centred**2).mean(1).mean() / 2)


def test_reverse_kl_is_scaled_by_the_squared_temperature():
    p, q = softmax(TEACHER, 4.0), softmax(STUDENT, 4.0)
    expected = 16 * (q * (q / p).log()).sum(1).mean()
    found = distillation_loss(STUDENT, TEACHER, temperature=4.0, soft_weight=1.0, divergence="reverse-kl")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jensen_shannon_is_scaled_by_the_squared_temperature(beta):
    p, q = softmax(TEACHER, 4.0), softmax(STUDENT, 4.0)
    m = beta * p + (1 - beta) * q
    expected = 16 * (beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()).sum(1).mean()
    options = {"temperature": 4.0, "soft_weight": 1.0, "divergence": "jensen-shannon", "beta": beta}
    torch.testing.assert_close(distillation_loss(STUDENT, TEACHER, **options), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("beta", "limit"), [(1e-7, forward_kl), (1 - 1e-7, reverse_kl)])
def test_jensen_shannon_tends_to_both_divergences(beta, limit):
    log_student, log_targets = torch.log_softmax(STUDENT, 1), torch.log_softmax(TEACHER, 1)
    found = jensen_shannon(log_student, log_targets, beta=beta) / min(beta, 1 - beta)
    torch.testing.assert_close(found, limit(log_student, log_targets), rtol=1e-3, atol=0)


def test_jensen_shannon_of_like_classes_has_the_gradient_of_unlike_ones():
    student = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64) + student.detach()
    loss = DistillationLoss(temperature=1.0, soft_weight=1.0, divergence="jensen-shannon", beta=0.2)
    assert torch.autograd.gradcheck(lambda logits: loss(logits, teacher), student)
    assert torch.autograd.gradcheck(lambda logits: loss(logits, torch.zeros_like(teacher)), student)


def test_the_hard_term_is_taken_at_temperature_one():
    found = distillation_loss(STUDENT, TEACHER, LABELS, temperature=4.0, soft_weight=0.0)
    torch.testing.assert_close(found, functional.cross_entropy(STUDENT, LABELS))


def test_soft_and_hard_terms_are_weighted():
    soft, hard, both = (
        distillation_loss(STUDENT, TEACHER, LABELS, temperature=4.0, soft_weight=weight) for weight in (1.0, 0.0, 0.75)
    )
    torch.testing.assert_close(both, 0.75 * soft + 0.25 * hard)


@pytest.mark.parametrize("divergence", ["forward-kl", "reverse-kl", "jensen-shannon", "logit-matching"])
def test_a_student_equal_to_its_teacher_up_to_a_shift_has_no_loss(divergence):
    found = distillation_loss(TEACHER + 5, TEACHER, temperature=3.0, soft_weight=1.0, divergence=divergence)
    torch.testing.assert_close(found, torch.tensor(0.0, dtype=torch.float64))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_reductions_agree(divergence):
    rows, total, mean = (
        distillation_loss(STUDENT, TEACHER, LABELS, temperature=2.0, divergence=divergence, reduction=reduction)
        for reduction in ("none", "sum", "mean")
    )
    assert rows.shape == (7,)
    torch.testing.assert_close(total, rows.sum())
    torch.testing.assert_close(mean, rows.mean())


def test_labels_are_not_needed_by_soft_targets_alone():
    assert distillation_loss(STUDENT, TEACHER, temperature=2.0, soft_weight=1.0).isfinite()


def test_labels_are_ignored_by_soft_targets_alone():
    found = distillation_loss(STUDENT, TEACHER, torch.full((7,), -1), temperature=2.0, soft_weight=1.0)
    assert torch.equal(found, distillation_loss(STUDENT, TEACHER, temperature=2.0, soft_weight=1.0))


def test_soft_targets_are_not_read_by_labels_alone():
    unavailable = cached(MEMBERS, available=torch.zeros(7, dtype=torch.bool))
    assert distillation_loss(STUDENT, unavailable, LABELS, temperature=2.0, soft_weight=0.0).isfinite()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_labels_may_have_any_integer_type(dtype):
    found = distillation_loss(STUDENT, TEACHER, LABELS.to(dtype), temperature=2.0)
    assert torch.equal(found, distillation_loss(STUDENT, TEACHER, LABELS, temperature=2.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_loss_is_float32_whatever_the_students_precision(dtype):
    assert distillation_loss(STUDENT.to(dtype), TEACHER, LABELS, temperature=2.0).dtype == torch.float32


def test_a_row_that_is_not_available_shows_as_nan():
    soft_targets = cached(MEMBERS, available=torch.arange(7) != 2)
    found = distillation_loss(STUDENT, soft_targets, temperature=2.0, soft_weight=1.0, reduction="none")
    assert found.isnan().nonzero().tolist() == [[2]]


# --- ensembles


@pytest.mark.parametrize("mean", MEANS)
def test_an_ensemble_is_its_mean_at_the_temperature(mean):
    log_p = log_mean_probabilities(MEMBERS, temperature=3.0, mean=mean, weights=[1.0, 2.0, 3.0])
    expected = 9 * forward_kl(torch.log_softmax(STUDENT / 3.0, 1), log_p).mean()
    found = distillation_loss(STUDENT, MEMBERS, temperature=3.0, soft_weight=1.0, mean=mean, weights=[1.0, 2.0, 3.0])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("mean", MEANS)
def test_a_cache_gives_the_loss_of_live_teachers(divergence, mean):
    options = {"temperature": 3.0, "divergence": divergence, "mean": mean, "weights": [1.0, 2.0, 3.0]}
    found = distillation_loss(STUDENT, cached(MEMBERS), LABELS, **options)
    torch.testing.assert_close(
        found, distillation_loss(STUDENT, MEMBERS.float().double(), LABELS, **options), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_teachers_and_weights_are_chosen_by_name(divergence):
    options = {"temperature": 3.0, "soft_weight": 1.0, "divergence": divergence}
    found = distillation_loss(STUDENT, cached(MEMBERS), teachers=["c", "a"], weights={"a": 1.0, "c": 3.0}, **options)
    expected = distillation_loss(STUDENT, MEMBERS[:, [0, 2]], weights=[0.25, 0.75], **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_eight_bit_codes_give_nearly_the_loss_of_live_teachers():
    codec = codec_for(Codes(), 5)
    decoder = Decoder(codec, parameters_to(codec.fit(TEACHER), "cpu"))
    soft_targets = SoftTargets((codec.encode(TEACHER, decoder.parameters),), (decoder,), ("a",))
    found, expected = (
        distillation_loss(STUDENT, source, LABELS, temperature=4.0) for source in (soft_targets, TEACHER)
    )
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=0.0)


@pytest.mark.parametrize("mean", MEANS)
def test_logit_matching_meets_the_limit_of_each_mean(mean):
    limit = soft_gradient(STUDENT, MEMBERS, 1e6, mean=mean)
    found = soft_gradient(STUDENT, MEMBERS, 1.0, "logit-matching", mean=mean)
    torch.testing.assert_close(found, limit, rtol=0.0, atol=1e-4)


# --- gradients


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 20.0])
def test_gradients_are_those_of_finite_differences(divergence, temperature):
    def loss(student):
        return distillation_loss(
            student, MEMBERS, LABELS, temperature=temperature, soft_weight=0.7, divergence=divergence, mean="arithmetic"
        )

    assert torch.autograd.gradcheck(loss, STUDENT.clone().requires_grad_())


@pytest.mark.parametrize("temperature", [1.0, 2.5, 20.0])
def test_the_gradient_of_the_unscaled_cross_entropy_is_equation_two(temperature):
    def unscaled(student):
        log_student = torch.log_softmax(student / temperature, 1)
        return soft_cross_entropy(log_student, torch.log_softmax(TEACHER / temperature, 1)).sum()

    expected = (softmax(STUDENT, temperature) - softmax(TEACHER, temperature)) / temperature
    torch.testing.assert_close(gradient(unscaled), expected)


@pytest.mark.parametrize("temperature", [1.0, 2.5, 20.0])
def test_forward_kl_and_cross_entropy_have_the_same_gradient(temperature):
    torch.testing.assert_close(
        soft_gradient(STUDENT, TEACHER, temperature, "forward-kl"),
        soft_gradient(STUDENT, TEACHER, temperature, "cross-entropy"),
    )


def test_the_gradient_of_logit_matching_is_equation_four():
    student, teacher = (values - values.mean(1, keepdim=True) for values in (STUDENT, TEACHER))
    torch.testing.assert_close(soft_gradient(student, teacher, 1.0, "logit-matching"), (student - teacher) / 5)


def test_the_soft_gradient_tends_to_logit_matching_at_the_rate_of_one_over_temperature():
    limit = soft_gradient(STUDENT, TEACHER, 1.0, "logit-matching")
    distances = [
        (soft_gradient(STUDENT, TEACHER, temperature) - limit).norm() / limit.norm() for temperature in (1e2, 1e3, 1e4)
    ]
    assert distances[0] < 0.1
    assert distances[0] / distances[1] == pytest.approx(10, rel=0.1)
    assert distances[1] / distances[2] == pytest.approx(10, rel=0.1)


def test_the_squared_temperature_keeps_the_size_of_the_soft_gradient():
    sizes = [soft_gradient(STUDENT, TEACHER, temperature).norm().item() for temperature in (20.0, 200.0)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.2)


def test_without_it_the_soft_gradient_shrinks_with_the_squared_temperature():
    sizes = [
        (soft_gradient(STUDENT, TEACHER, temperature) / temperature**2).norm().item() for temperature in (20.0, 200.0)
    ]
    assert sizes[0] / sizes[1] == pytest.approx(100, rel=0.2)


def test_teacher_logits_get_no_gradient():
    teacher = TEACHER.clone().requires_grad_()
    loss = distillation_loss(STUDENT.clone().requires_grad_(), teacher, temperature=2.0, soft_weight=1.0)
    loss.backward()
    assert teacher.grad is None


def test_logits_far_apart_give_finite_losses_and_gradients():
    student = torch.tensor([[300.0, 0.0, -300.0]])
    teacher = torch.tensor([[-300.0, 0.0, 300.0]])
    assert distillation_loss(student, teacher, temperature=1.0, soft_weight=1.0).item() == pytest.approx(600.0)
    assert soft_gradient(student, teacher, 1.0).tolist() == [[1.0, 0.0, -1.0]]


# --- float32 at high temperatures

WIDE_STUDENT = torch.randn(8, 1000, generator=torch.Generator().manual_seed(1)) * 4
NEAR_TEACHER = WIDE_STUDENT + 0.3 * torch.randn(8, 1000, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("temperature", [20.0, 100.0, 1000.0])
def test_forward_kl_in_float32_keeps_its_digits_at_high_temperatures(temperature):
    options = {"temperature": temperature, "soft_weight": 1.0, "reduction": "none"}
    found = distillation_loss(WIDE_STUDENT, NEAR_TEACHER, **options)
    expected = distillation_loss(WIDE_STUDENT.double(), NEAR_TEACHER.double(), **options)
    torch.testing.assert_close(found.double(), expected, rtol=0.1, atol=0.0)


def test_the_usual_sum_loses_them():
    log_p, log_q = (torch.log_softmax(values / 1000.0, 1) for values in (NEAR_TEACHER, WIDE_STUDENT))
    usual = 1e6 * functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1)
    expected = distillation_loss(
        WIDE_STUDENT.double(), NEAR_TEACHER.double(), temperature=1000.0, soft_weight=1.0, reduction="none"
    )
    assert ((usual - expected).abs() / expected).max() > 0.2


@pytest.mark.parametrize("temperature", [20.0, 100.0, 1000.0])
def test_gradients_in_float32_keep_their_digits_at_high_temperatures(temperature):
    found = soft_gradient(WIDE_STUDENT, NEAR_TEACHER, temperature).double()
    expected = soft_gradient(WIDE_STUDENT.double(), NEAR_TEACHER.double(), temperature)
    assert (found - expected).norm() / expected.norm() < 2e-3


# --- logit matching by itself


def test_logit_matching_sees_no_shift_of_a_row():
    shifted = logit_matching_loss(STUDENT + 3, TEACHER - torch.arange(7.0)[:, None])
    torch.testing.assert_close(shifted, logit_matching_loss(STUDENT, TEACHER))


def test_logit_matching_refuses_different_shapes():
    with pytest.raises(ShapeError, match=r"shape \(7, 5\), the teacher's \(7, 4\)"):
        logit_matching_loss(STUDENT, TEACHER[:, :4])


def test_logit_matching_refuses_an_unknown_reduction():
    with pytest.raises(OptionError, match="'mean', 'sum', 'none'; got 'median'"):
        logit_matching_loss(STUDENT, TEACHER, reduction="median")


# --- errors


def test_missing_labels_are_refused_with_the_weight_that_needs_none():
    with pytest.raises(ShapeError, match=r"soft_weight=0\.75 leaves 0\.25 to the labels.*or soft_weight=1\.0"):
        distillation_loss(STUDENT, TEACHER, temperature=2.0, soft_weight=0.75)


@pytest.mark.parametrize(
    "labels", [torch.zeros(6, dtype=torch.int64), torch.zeros(7, 1, dtype=torch.int64), torch.zeros(7), LABELS > 0]
)
def test_labels_of_another_kind_are_refused_with_both_shapes(labels):
    with pytest.raises(ShapeError, match="7 rows of student logits need as many integer labels, got"):
        distillation_loss(STUDENT, TEACHER, labels, temperature=2.0)


@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_that_is_no_class_is_refused_with_the_range(label):
    labels = torch.tensor([0, 1, 2, 3, 4, 0, label])
    with pytest.raises(ShapeError, match=r"Labels range from -?\d to \d, the student's 5 classes from 0 to 4"):
        distillation_loss(STUDENT, TEACHER, labels, temperature=2.0)


@pytest.mark.parametrize("soft_targets", [TEACHER[:6], TEACHER[:, :4], MEMBERS[:, :, :4]])
def test_soft_targets_of_another_size_are_refused_with_both_sizes(soft_targets):
    expected = f"7 rows of 5 classes, the soft targets are {len(soft_targets)} rows of {soft_targets.shape[-1]} classes"
    with pytest.raises(ShapeError, match=expected):
        distillation_loss(STUDENT, soft_targets, LABELS, temperature=2.0)


def test_a_cache_of_another_class_count_is_refused_with_both():
    with pytest.raises(ShapeError, match="7 rows of 5 classes, the soft targets are 7 rows of 4 classes"):
        distillation_loss(STUDENT, cached(MEMBERS[:, :, :4]), LABELS, temperature=2.0)


@pytest.mark.parametrize("student", [STUDENT[0], STUDENT[None, None], LABELS[:, None]])
def test_student_logits_with_other_axes_are_refused(student):
    with pytest.raises(
        ShapeError, match=r"The student's logits must be floating-point numbers with the axes \[row, class\]"
    ):
        distillation_loss(student, TEACHER, LABELS, temperature=2.0)


def test_arguments_in_the_other_order_are_told_apart():
    with pytest.raises(ShapeError, match=r"logits are a list, not a tensor; the order is distillation_loss\(student"):
        distillation_loss([[1.0, 0.0]], torch.zeros(1, 2), temperature=1.0)


def test_teacher_logits_with_other_axes_are_refused():
    with pytest.raises(ShapeError, match=r"\[row, class\] or \[row, teacher, class\], got shape \(5,\)"):
        distillation_loss(STUDENT, TEACHER[0], LABELS, temperature=2.0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf, torch.ones(2)])
def test_what_is_no_temperature_is_refused(temperature):
    with pytest.raises(TemperatureError):
        distillation_loss(STUDENT, TEACHER, LABELS, temperature=temperature)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"soft_weight": 1.1}, r"soft_weight must lie between 0 and 1, got 1\.1"),
        ({"soft_weight": -0.1}, r"soft_weight must lie between 0 and 1"),
        ({"soft_weight": math.nan}, r"soft_weight must lie between 0 and 1"),
        (
            {"divergence": "hinge"},
            "divergence must be one of 'forward-kl', .*'reverse-kl', 'jensen-shannon', 'logit-matching'; got 'hinge'",
        ),
        ({"beta": 0.0}, "beta must lie between 0 and 1, got 0.0.*'forward-kl' and 'reverse-kl'"),
        ({"beta": 1.0}, "beta must lie between 0 and 1"),
        ({"mean": "median"}, "mean must be one of"),
        ({"reduction": "max"}, "reduction must be one of"),
    ],
)
def test_options_out_of_range_are_refused_when_called_and_when_made(options, message):
    with pytest.raises(OptionError, match=message):
        distillation_loss(STUDENT, TEACHER, LABELS, temperature=2.0, **options)
    with pytest.raises(OptionError, match=message):
        DistillationLoss(temperature=2.0, **options)


@pytest.mark.parametrize("options", [{"teachers": ["a"]}, {"weights": {"a": 1.0}}])
def test_plain_logits_have_no_names(options):
    with pytest.raises(OptionError, match="need a SoftTargets"):
        distillation_loss(STUDENT, MEMBERS, LABELS, temperature=2.0, **options)


def test_an_unknown_teacher_is_refused():
    with pytest.raises(UnknownTeacherError, match=r"the ensemble has \['a', 'b', 'c'\]"):
        distillation_loss(STUDENT, cached(MEMBERS), LABELS, temperature=2.0, teachers=["d"])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("mean", ["arithmetic", "tempered-arithmetic"])
def test_a_merged_cache_refuses_other_means(divergence, mean):
    merged = cached(MEMBERS[:, :1], merge="geometric")
    with pytest.raises(MergedCacheError, match=f"cannot give mean='{mean}'"):
        distillation_loss(STUDENT, merged, LABELS, temperature=2.0, divergence=divergence, mean=mean)


# --- the module


def test_the_module_gives_the_functions_loss():
    options = {"temperature": 3.0, "soft_weight": 0.6, "divergence": "cross-entropy", "mean": "arithmetic"}
    module = DistillationLoss(**options, weights=[1.0, 2.0, 3.0], reduction="sum")
    expected = distillation_loss(STUDENT, MEMBERS, LABELS, **options, weights=[1.0, 2.0, 3.0], reduction="sum")
    assert torch.equal(module(STUDENT, MEMBERS, LABELS), expected)


def test_the_module_selects_teachers():
    module = DistillationLoss(temperature=3.0, soft_weight=1.0, teachers=["b"])
    expected = distillation_loss(STUDENT, cached(MEMBERS), temperature=3.0, soft_weight=1.0, teachers=["b"])
    assert torch.equal(module(STUDENT, cached(MEMBERS)), expected)


def test_the_module_shows_its_options():
    assert "temperature=3.0, soft_weight=0.9, divergence='forward-kl', mean='geometric'" in repr(
        DistillationLoss(temperature=3.0)
    )


def test_the_loss_compiles_as_one_graph():
    compiled = torch.compile(DistillationLoss(temperature=3.0), fullgraph=True, backend="aot_eager")
    expected = distillation_loss(STUDENT, MEMBERS, LABELS, temperature=3.0)
    torch.testing.assert_close(compiled(STUDENT, MEMBERS, LABELS), expected)


def test_the_loss_of_a_coded_batch_compiles_as_one_graph():
    codec = codec_for(Codes(), 5)
    decoder = Decoder(codec, parameters_to(codec.fit(TEACHER), "cpu"))
    codes = codec.encode(TEACHER, decoder.parameters)

    def loss(student, codes, labels):
        return distillation_loss(student, SoftTargets((codes,), (decoder,), ("a",)), labels, temperature=3.0)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(STUDENT, codes, LABELS), loss(STUDENT, codes, LABELS))


# --- reduced precision and devices


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_autocast_changes_no_loss(divergence, mean):
    loss = DistillationLoss(temperature=4.0, soft_weight=0.5, divergence=divergence, mean=mean)
    expected = loss(STUDENT.float(), MEMBERS.float(), LABELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(STUDENT.float(), MEMBERS.float(), LABELS)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_in_bfloat16_has_a_float32_loss(divergence):
    loss = DistillationLoss(temperature=4.0, soft_weight=0.5, divergence=divergence)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(STUDENT.bfloat16(), MEMBERS.bfloat16(), LABELS)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("teacher", [TEACHER, MEMBERS], ids=["one teacher", "three teachers"])
def test_plain_teacher_logits_follow_the_student_to_its_device(teacher, divergence):
    found = distillation_loss(STUDENT.to("meta"), teacher, LABELS, temperature=4.0, divergence=divergence)
    assert found.device.type == "meta"


# --- sampled soft targets, and codecs that depend on the temperature

ONE_TEACHER = torch.randn(1, 20, generator=torch.Generator().manual_seed(5)) * 2
ONE_STUDENT = torch.randn(1, 20, generator=torch.Generator().manual_seed(6), dtype=torch.float64) * 2


def in_topk(logits, **options):
    """Soft targets [row] of one teacher."""
    codec = codec_for(TopK(**options), logits.shape[-1])
    decoder = Decoder(codec, parameters_to(codec.fit(logits), "cpu"))
    return SoftTargets((codec.encode(logits, decoder.parameters),), (decoder,), ("a",))


@pytest.mark.parametrize("divergence", ["forward-kl", "cross-entropy"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_gradients_from_sampled_soft_targets_are_right_on_average(divergence, temperature):
    noise = torch.randn(6000, 20, generator=torch.Generator().manual_seed(0)) * 1e-5  # other rows, other draws
    soft_targets = in_topk(ONE_TEACHER + noise, k=2, tail="samples", num_samples=4, step=2.0**-6)
    draws = soft_gradient(ONE_STUDENT.repeat(6000, 1), soft_targets, temperature, divergence)
    expected = soft_gradient(ONE_STUDENT, ONE_TEACHER.double(), temperature, divergence)[0]
    error = draws.std(0) / len(draws) ** 0.5
    assert float(error.max()) < 0.05 * float(expected.abs().max())
    assert bool(((draws.mean(0) - expected).abs() <= 5 * error + 0.01 * expected.abs().max()).all())


@pytest.mark.parametrize("divergence", ["forward-kl", "cross-entropy"])
def test_classes_that_were_not_drawn_leave_loss_and_gradient_finite(divergence):
    soft_targets = in_topk(ONE_TEACHER, k=2, tail="samples", num_samples=4)
    assert bool(soft_targets.log_probabilities(2.0).isneginf().any())
    assert bool(soft_gradient(ONE_STUDENT, soft_targets, 2.0, divergence).isfinite().all())
    loss = distillation_loss(ONE_STUDENT, soft_targets, temperature=2.0, soft_weight=1.0, divergence=divergence)
    assert bool(loss.isfinite())


@pytest.mark.parametrize("compare", [forward_kl, soft_cross_entropy])
def test_a_class_without_probability_costs_what_its_absence_costs(compare):
    log_student = torch.log_softmax(STUDENT, 1)
    log_targets = torch.log_softmax(TEACHER, 1)
    log_targets[:, 2] = -torch.inf
    p = log_targets.exp()
    expected = -(p * log_student).sum(1)
    if compare is forward_kl:
        rest = [0, 1, 3, 4]
        expected = expected + (p * log_targets)[:, rest].sum(1) + 1 - p.sum(1)
    torch.testing.assert_close(compare(log_student, log_targets), expected)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_row_that_is_not_available_makes_every_loss_nan(divergence):
    soft_targets = cached(MEMBERS, available=torch.tensor([True, True, False, True, True, True, True]))
    options = {"temperature": 2.0, "soft_weight": 1.0, "divergence": divergence, "reduction": "none"}
    found = distillation_loss(STUDENT.float(), soft_targets, **options)
    assert found.isnan().nonzero().tolist() == [[2]]


def test_the_loss_from_topk_is_taken_at_its_temperature():
    soft_targets = in_topk(ONE_TEACHER.repeat(3, 1), k=4)
    student = ONE_STUDENT.repeat(3, 1)
    decoded = soft_targets.logits(temperature=4.0)[:, 0].double()
    found = distillation_loss(student, soft_targets, temperature=4.0, soft_weight=1.0)
    torch.testing.assert_close(found, distillation_loss(student, decoded, temperature=4.0, soft_weight=1.0))


def test_logit_matching_with_sampled_soft_targets_is_refused():
    soft_targets = in_topk(ONE_TEACHER, k=2, tail="samples")
    with pytest.raises(OptionError, match="sampled"):
        distillation_loss(ONE_STUDENT, soft_targets, temperature=2.0, soft_weight=1.0, divergence="logit-matching")


@pytest.mark.parametrize("mean", MEANS)
def test_logit_matching_meets_the_logits_that_topk_gives_at_a_high_temperature(mean):
    rows = torch.randn(50, 20, generator=torch.Generator().manual_seed(7)) * 2
    found = logits_to_match(in_topk(rows, k=4), mean=mean)
    found, true = (values - values.mean(1, keepdim=True) for values in (found, rows))
    top = rows.topk(4, 1).indices
    torch.testing.assert_close(found.gather(1, top), true.gather(1, top), rtol=0, atol=0.15)


def test_logit_matching_goes_on_where_forward_kl_from_topk_tends():
    rows = torch.randn(50, 20, generator=torch.Generator().manual_seed(7)) * 2
    student = torch.randn(50, 20, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    soft_targets = in_topk(rows, k=4)
    matched = soft_gradient(student, soft_targets, 1.0, "logit-matching")
    torch.testing.assert_close(soft_gradient(student, soft_targets, 300.0), matched, rtol=0.02, atol=5e-4)


# --- masked classes

INF = float("inf")
MASK = torch.tensor([[False, True, False, False, True]]).expand(7, -1) & (torch.arange(7) != 3)[:, None]
MASKED_TEACHER = TEACHER.masked_fill(MASK, -INF)


BOUNDED = ["forward-kl", "cross-entropy", "jensen-shannon", "logit-matching"]


@pytest.mark.parametrize("divergence", BOUNDED)
@pytest.mark.parametrize("student", [STUDENT, STUDENT.masked_fill(MASK, -INF)], ids=["finite", "masked"])
@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_masked_classes_give_finite_losses_and_gradients(divergence, student, temperature):
    loss = distillation_loss(student, MASKED_TEACHER, temperature=temperature, soft_weight=1.0, divergence=divergence)
    assert loss.isfinite()
    assert soft_gradient(student, MASKED_TEACHER, temperature, divergence).isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_classes_that_both_mask_are_as_if_left_out(divergence):
    options = {"temperature": 3.0, "soft_weight": 1.0, "divergence": divergence}
    rest = [0, 2, 3]
    found = distillation_loss(STUDENT.masked_fill(MASK, -INF)[:3], MASKED_TEACHER[:3], **options)
    torch.testing.assert_close(found, distillation_loss(STUDENT[:3, rest], TEACHER[:3, rest], **options))


def test_forward_kl_charges_the_student_for_probability_on_masked_classes():
    found = distillation_loss(torch.zeros(1, 2), torch.tensor([[0.0, -INF]]), temperature=1.0, soft_weight=1.0)
    assert found.item() == pytest.approx(math.log(2))


def test_the_gradient_takes_probability_from_masked_classes():
    slope = soft_gradient(STUDENT, MASKED_TEACHER, 2.0)
    expected = 2 * (softmax(STUDENT, 2.0) - softmax(MASKED_TEACHER, 2.0))
    torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("divergence", ["forward-kl", "cross-entropy"])
def test_a_class_that_the_student_alone_masks_costs_infinitely_much(divergence):
    student = torch.tensor([[0.0, -INF]])
    assert distillation_loss(
        student, torch.zeros(1, 2), temperature=1.0, soft_weight=1.0, divergence=divergence
    ).isposinf()


@pytest.mark.parametrize("divergence", ["forward-kl", "cross-entropy"])
def test_a_class_of_no_probability_may_be_masked_by_the_student(divergence):
    student = torch.tensor([[0.0, -INF]])
    loss = distillation_loss(
        student, torch.tensor([[0.0, -1e4]]), temperature=1.0, soft_weight=1.0, divergence=divergence
    )
    assert loss == 0


def test_reverse_kl_is_infinite_where_the_student_gives_probability_to_a_masked_class():
    found = distillation_loss(
        torch.zeros(1, 2), torch.tensor([[0.0, -INF]]), temperature=1.0, soft_weight=1.0, divergence="reverse-kl"
    )
    assert found.isposinf()


@pytest.mark.parametrize("divergence", ["reverse-kl", "jensen-shannon"])
def test_a_class_that_the_student_alone_masks_costs_a_finite_amount(divergence):
    student = STUDENT.masked_fill(MASK, -INF)
    options = {"temperature": 2.0, "soft_weight": 1.0, "divergence": divergence}
    assert distillation_loss(student, TEACHER, **options).isfinite()
    assert soft_gradient(student, TEACHER, 2.0, divergence)[MASK].eq(0).all()


def test_jensen_shannon_of_two_that_share_no_class_is_the_entropy_of_beta():
    found = jensen_shannon(torch.tensor([0.0, -INF]), torch.tensor([-INF, 0.0]), beta=0.25)
    assert found.item() == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))


def test_logit_matching_does_not_see_the_student_where_the_teacher_masks():
    assert logit_matching_loss(torch.tensor([[1.0, 7.0, -1.0]]), torch.tensor([[12.0, -INF, 8.0]])) == 0.5


@pytest.mark.parametrize("divergence", BOUNDED)
@pytest.mark.parametrize("mean", MEANS)
def test_masks_of_some_members_give_finite_losses_and_gradients(divergence, mean):
    members = MEMBERS.clone()
    members[:, 1] = members[:, 1].masked_fill(MASK, -INF)
    assert soft_gradient(STUDENT, cached(members), 2.0, divergence, mean).isfinite().all()


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_coded_masks_give_the_loss_of_the_teacher(dtype):
    codec = codec_for(Codes(dtype=dtype), 5)
    parameters = parameters_to(codec.fit(MASKED_TEACHER), "cpu")
    decoder = Decoder(codec, parameters)
    soft_targets = SoftTargets((codec.encode(MASKED_TEACHER, parameters),), (decoder,), ("a",))
    found, expected = (
        distillation_loss(STUDENT, targets, temperature=2.0, soft_weight=1.0)
        for targets in (soft_targets, MASKED_TEACHER)
    )
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0.0)
