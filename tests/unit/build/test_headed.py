"""Teachers that hand out hidden states and head: taken apart, cached, and read again."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

import kdcache
from kdcache import RateTarget, Spectral, TeacherWithHead, TransferSet, build_cache
from kdcache.build import ModuleTeacher
from kdcache.codecs import measure
from kdcache.errors import JobError, NonFiniteLogitsError, TeacherError, WrongClassCountError

NUM_CLASSES = 5000
HELD = (1.0, 2.0, 4.0)


def body() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 20))
    nn.init.normal_(network[0].weight, std=1.0)
    return network


def teacher(num_classes=NUM_CLASSES, **options) -> TeacherWithHead:
    network, head = body(), nn.Linear(20, num_classes)
    nn.init.normal_(head.weight, std=2.0)
    return TeacherWithHead(network, head, **options)


def examples(num_examples=600) -> torch.Tensor:
    return torch.randn(num_examples, 16, generator=torch.Generator().manual_seed(3))


class Watched(TeacherWithHead):
    """Notes the widest thing that was made of a whole batch."""

    def __init__(self, whole: TeacherWithHead) -> None:
        super().__init__(whole.body, whole.head, softcap=whole.softcap)
        self.num_wide = 0

    def forward(self, *args, **inputs):
        self.num_wide += 1
        return super().forward(*args, **inputs)


def built(tmp_path, network, **options):
    options = {"codec": Spectral(max_kl=0.02), "batch_size": 100, "num_pilot_rows": 300, "shard_rows": 256, **options}
    return build_cache(tmp_path / "cache", TransferSet.from_arrays(examples()), {"a": network}, **options)


def test_as_a_module_it_gives_logits():
    whole = teacher()
    assert torch.equal(whole(examples(3)), whole.head(whole.body(examples(3))))


def test_a_softcap_bounds_the_logits():
    assert teacher(softcap=5.0)(examples()).abs().amax() <= 5.0


@pytest.mark.parametrize("autocast", [None, "bfloat16"])
def test_a_cache_of_hidden_states_holds_the_teachers_logits(tmp_path, autocast):
    cache = built(tmp_path, teacher(), autocast=autocast)
    with torch.inference_mode():
        divergence = measure(teacher()(examples()), cache.read(range(600)).logits()[:, 0], HELD)
    rounding = 0.0 if autocast is None else 0.002  # of the teacher, not of the cache
    assert divergence.mean(dim=0).amax() <= 0.02 + rounding
    assert divergence.amax() <= 0.04 + 10 * rounding


def test_a_build_never_asks_for_the_logits_of_a_batch(tmp_path):
    network = Watched(teacher())
    cache = built(tmp_path, network)
    assert cache.teacher_names == ("a",)
    assert network.num_wide <= 1  # one batch, to count the classes


def test_the_certificate_holds_for_every_row(tmp_path):
    cache = built(tmp_path, teacher())
    decoded = cache.read(range(600)).logits()[:, 0]
    with torch.inference_mode():
        logits = teacher()(examples())
    for temperature in (1.0, 1.5, 2.0, 4.0, 20.0):
        assert measure(logits, decoded, [temperature]).amax() <= cache.certificate(temperature).kl_bound


def test_a_rate_target_is_met_from_hidden_states(tmp_path):
    cache = built(tmp_path, teacher(), codec=RateTarget(max_kl=0.01))
    with torch.inference_mode():
        divergence = measure(teacher()(examples()), cache.read(range(600)).logits()[:, 0], HELD)
    assert divergence.mean(dim=0).amax() <= 0.01


def test_another_codec_takes_the_logits(tmp_path):
    cache = built(tmp_path, teacher(), codec=kdcache.Codes())
    with torch.inference_mode():
        assert measure(teacher()(examples()), cache.read(range(600)).logits()[:, 0], HELD).mean() <= 0.01


def test_softcapped_logits_are_made_and_coded(tmp_path):
    network = Watched(teacher(softcap=30.0))
    cache = built(tmp_path, network, codec=Spectral(max_kl=0.05), num_pilot_rows=600)
    assert network.num_wide > 1
    with torch.inference_mode():
        divergence = measure(network(examples()), cache.read(range(600)).logits()[:, 0], HELD)
    assert divergence.mean(dim=0).amax() <= 0.05


def test_a_build_goes_on_where_it_stopped(tmp_path):
    first = built(tmp_path, teacher()).document
    again = built(tmp_path, teacher()).document
    assert again == first


def test_sequences_give_a_row_a_position(tmp_path):
    inputs = examples(600).reshape(120, 5, 16)
    lengths = [1 + index % 5 for index in range(120)]
    cache = build_cache(
        tmp_path / "cache",
        TransferSet.from_arrays(inputs, num_rows=lengths),
        {"a": teacher()},
        codec=Spectral(max_kl=0.02),
        num_pilot_rows=300,
    )
    with torch.inference_mode():
        logits = teacher()(inputs[7, : lengths[7]])
    assert measure(logits, cache.read([7]).logits()[:, 0], HELD).amax() <= 0.04


class Broken(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.full((len(inputs), 20), self.value)


def test_a_hidden_state_that_is_no_number_stops_the_build_by_name(tmp_path):
    whole = teacher()
    whole.head.bias.data.zero_()
    whole.body = Broken(float("nan"))
    with pytest.raises(NonFiniteLogitsError, match="teacher 'a'"):
        built(tmp_path, whole)


def test_hidden_states_in_float16_whose_sum_overflows_are_numbers(tmp_path):
    """Sixty-five thousand is the largest number of float16; the sum of twenty of them is none."""
    whole = teacher()
    whole.body = nn.Sequential(whole.body, Rounded())
    whole.head.weight.data.mul_(1e-3)
    whole.head.half()
    cache = built(tmp_path, whole, codec=Spectral(step=50.0))
    assert cache.complete is not None


class Rounded(nn.Module):
    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return (states.sign() * 3e4 + 1e3 * states).half()


def test_a_teacher_travels_without_a_second_copy_of_its_head():
    module_teacher = ModuleTeacher("a", teacher())
    alone = len(pickle.dumps(module_teacher))
    with module_teacher.running_body():
        pass
    assert len(pickle.dumps(module_teacher)) == alone


class Narrowing(nn.Module):
    """Gives hidden states of another width once it has been asked often enough."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.num_calls = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        hidden = self.inner(inputs)
        return hidden if self.num_calls < 3 else hidden[:, :7]


def test_a_body_that_does_not_fit_its_head_is_refused(tmp_path):
    whole = teacher()
    with pytest.raises((WrongClassCountError, TeacherError), match="7 components"):
        built(tmp_path, TeacherWithHead(Narrowing(whole.body), whole.head))


def test_a_head_that_is_not_linear_is_refused():
    with pytest.raises(JobError, match="Linear"):
        TeacherWithHead(body(), nn.Sequential(nn.Linear(20, 5)))


@pytest.mark.parametrize("softcap", [0.0, -1.0, float("nan")])
def test_a_softcap_that_caps_nothing_is_refused(softcap):
    with pytest.raises(JobError, match="softcap"):
        teacher(softcap=softcap)


def test_a_body_without_hidden_states_is_refused():
    class Says(nn.Module):
        def forward(self, _):
            return {"last_hidden_state": None}

    with pytest.raises(JobError, match="last_hidden_state"):
        TeacherWithHead(Says(), nn.Linear(20, 5))(examples(2))


def test_its_head_may_be_had_in_the_precision_it_runs_in():
    with ModuleTeacher("a", teacher(), autocast="bfloat16").running_body() as (_, head):
        assert head.weight.dtype == torch.bfloat16


def test_a_module_without_head_hands_out_none():
    plain = ModuleTeacher("a", body())
    assert not plain.has_linear_head()
    with pytest.raises(TypeError, match="hands out no head"), plain.running_body():
        pass


def test_it_is_sent_to_other_processes_whole():
    whole = teacher(num_classes=30)
    assert torch.equal(pickle.loads(pickle.dumps(whole))(examples(2)), whole(examples(2)))  # noqa: S301


# Models of transformers -----------------------------------------------------------------------------------------------


def language_model(kind: str, **options):
    transformers = pytest.importorskip("transformers", reason="transformers is missing: run `make setup`")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 5003,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        **options,
    }
    config = getattr(transformers, f"{kind}Config")(**sizes)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Gemma2"])
def test_a_language_model_is_taken_apart(kind):
    model = language_model(kind)
    ids = torch.arange(20).reshape(2, 10)
    with torch.inference_mode():
        ours, theirs = TeacherWithHead.from_transformers(model)(input_ids=ids), model(input_ids=ids).logits
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_the_softcap_of_a_model_is_followed():
    assert TeacherWithHead.from_transformers(language_model("Gemma2", final_logit_softcapping=3.0)).softcap == 3.0


def test_a_model_that_scales_its_logits_is_refused():
    with pytest.raises(JobError, match="logits_scaling"):
        TeacherWithHead.from_transformers(language_model("Granite", logits_scaling=4.0))


def test_a_model_that_does_more_than_it_says_is_refused():
    model = language_model("Llama")
    plain = model.forward

    def doubled(**inputs):
        output = plain(**inputs)
        output.logits = output.logits * 2
        return output

    model.forward = doubled
    with pytest.raises(JobError, match="differ by"):
        TeacherWithHead.from_transformers(model)


def test_a_language_model_is_cached_from_its_hidden_states(tmp_path):
    model = language_model("Llama")
    nn.init.normal_(model.lm_head.weight, std=1.0)
    ids = torch.randint(5003, (40, 16), generator=torch.Generator().manual_seed(1))
    whole = TeacherWithHead.from_transformers(model)
    cache = build_cache(
        tmp_path / "cache",
        TransferSet.from_arrays(ids, num_rows=[16] * 40),
        {"lm": whole},
        codec=Spectral(max_kl=0.02),
        num_pilot_rows=400,
    )
    with torch.inference_mode():
        logits = model(input_ids=ids[3:4]).logits[0]
    assert measure(logits, cache.read([3]).logits()[:, 0], HELD).amax() <= 0.04


def test_what_is_no_model_of_transformers_is_refused_with_the_ways_in():
    with pytest.raises(JobError, match=r"takes a causal language model of transformers, got a Linear.*body, head"):
        TeacherWithHead.from_transformers(nn.Linear(4, 5))


def test_a_model_without_a_head_is_refused_because_its_hidden_states_are_no_logits():
    with pytest.raises(JobError, match=r"LlamaModel has no head: it gives hidden states.*\.\.\.ForCausalLM"):
        TeacherWithHead.from_transformers(language_model("Llama").model)
