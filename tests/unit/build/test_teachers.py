from __future__ import annotations

import pickle
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tiny_caches import TinyTeacher, tiny_inputs
from torch import nn

from kdcache.build import ModuleTeacher, SourcedTeacher, Teacher, weights_digest
from kdcache.build.teachers import MergedTeacher
from kdcache.documents import TeacherSource
from kdcache.errors import JobError, WrongClassCountError

INPUTS = tiny_inputs(6)


def run(teacher: Teacher, inputs=INPUTS) -> torch.Tensor:
    with teacher.running() as forward:
        return forward(inputs)


# Live modules ---------------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """A network of which a part was frozen by hand: its modules are in different modes."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.head = nn.Linear(8, 3)
        self.features[1].eval()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(inputs))


def test_a_module_runs_in_evaluation_mode():
    teacher = ModuleTeacher("a", Mixed().train())
    assert torch.equal(run(teacher), run(teacher))


def test_a_module_gets_the_mode_of_each_of_its_parts_back():
    module = Mixed()
    before = [part.training for part in module.modules()]
    run(ModuleTeacher("a", module))
    assert [part.training for part in module.modules()] == before


def test_a_module_gets_its_modes_back_after_an_error():
    module = Mixed()
    with pytest.raises(RuntimeError):
        run(ModuleTeacher("a", module), torch.zeros(2, 99))
    assert module.training


def test_a_module_in_use_twice_stays_in_evaluation_mode_until_the_last_use_is_over():
    module = Mixed().train()
    first, second = ModuleTeacher("a", module).running(), ModuleTeacher("b", module).running()
    first.__enter__()
    forward = second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(forward(INPUTS), forward(INPUTS))
    second.__exit__(None, None, None)
    assert module.training


def test_running_statistics_stay_as_they_were():
    module = Mixed().train()
    before = weights_digest(module)
    run(ModuleTeacher("a", module))
    assert weights_digest(module) == before


@pytest.mark.accelerator
def test_a_module_runs_on_the_device_asked_for():
    assert run(ModuleTeacher("a", TinyTeacher(), device="cuda")).device.type == "cuda"


@pytest.mark.accelerator
def test_a_module_gets_its_device_back():
    module = TinyTeacher()
    run(ModuleTeacher("a", module, device="cuda"))
    assert module.weight.device.type == "cpu"


def test_logits_need_no_gradients():
    assert not run(ModuleTeacher("a", TinyTeacher())).requires_grad


def test_a_module_without_parameters_runs():
    assert torch.equal(run(ModuleTeacher("a", nn.Identity())), INPUTS)


class Difference(nn.Module):
    def forward(self, left, right):
        return left["x"] - right if isinstance(left, dict) else left - right


@pytest.mark.parametrize(
    "inputs",
    [{"right": 2 * INPUTS, "left": INPUTS}, (INPUTS, 2 * INPUTS), [{"x": INPUTS}, 2 * INPUTS]],
    ids=["mapping by name", "tuple by position", "nested"],
)
def test_inputs_of_several_parts_become_arguments(inputs):
    assert torch.equal(run(ModuleTeacher("a", Difference()), inputs), -INPUTS)


class Wrapped(nn.Module):
    def __init__(self, wrap) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, inputs):
        return self.wrap(inputs)


@pytest.mark.parametrize(
    "wrap",
    [lambda logits: SimpleNamespace(logits=logits, loss=None), lambda logits: {"loss": None, "logits": logits}],
    ids=["object", "mapping"],
)
def test_outputs_with_logits_are_taken_as_transformers_give_them(wrap):
    assert torch.equal(run(ModuleTeacher("a", Wrapped(wrap))), INPUTS)


@pytest.mark.parametrize("wrap", [lambda logits: (logits,), lambda _: None, lambda logits: {"scores": logits}])
def test_outputs_without_logits_are_refused(wrap):
    with pytest.raises(WrongClassCountError, match="a tensor of logits, or an object or mapping with `logits`"):
        run(ModuleTeacher("a", Wrapped(wrap)))


def test_autocast_runs_in_the_precision_asked_for():
    assert run(ModuleTeacher("a", TinyTeacher(), autocast="bfloat16")).dtype == torch.bfloat16


def test_without_autocast_the_modules_own_precision_holds():
    assert run(ModuleTeacher("a", TinyTeacher().double()), INPUTS.double()).dtype == torch.float64


# Fingerprints ---------------------------------------------------------------------------------------------------------


def test_a_fingerprint_names_teacher_class_and_precision():
    fingerprint = ModuleTeacher("a", TinyTeacher(), autocast="float16").fingerprint
    assert (fingerprint.name, fingerprint.source, fingerprint.autocast) == ("a", "tiny_caches:TinyTeacher", "float16")


def test_equal_weights_have_equal_digests():
    assert weights_digest(TinyTeacher(0)) == weights_digest(TinyTeacher(0))


def test_one_changed_weight_changes_the_digest():
    module = TinyTeacher(0)
    before = weights_digest(module)
    module.weight.data[2, 1] = torch.nextafter(module.weight.data[2, 1], torch.tensor(9.0))
    assert weights_digest(module) != before


def test_a_changed_buffer_changes_the_digest():
    module = Mixed()
    before = weights_digest(module)
    module.features[1].running_mean[0] = 1
    assert weights_digest(module) != before


@pytest.mark.parametrize(
    "change",
    [lambda module: module.double(), nn.Sequential, lambda module: nn.ParameterList([module.weight])],
    ids=["dtype", "names", "parameters"],
)
def test_other_names_or_types_change_the_digest(change):
    assert weights_digest(change(TinyTeacher(0))) != weights_digest(TinyTeacher(0))


def test_a_buffer_that_is_not_saved_changes_the_digest():
    one, other = TinyTeacher(0), TinyTeacher(0)
    one.register_buffer("mask", torch.zeros(2), persistent=False)
    other.register_buffer("mask", torch.ones(2), persistent=False)
    assert weights_digest(one) != weights_digest(other)


@pytest.mark.parametrize(
    "other",
    [
        ModuleTeacher("a", nn.Sequential(TinyTeacher(0), nn.Tanh())),
        ModuleTeacher("a", nn.Sequential(TinyTeacher(0), nn.ReLU()), arguments={"temperature": 2}),
    ],
    ids=["layers", "arguments"],
)
def test_other_settings_with_the_same_weights_are_another_teacher(other):
    ours = ModuleTeacher("a", nn.Sequential(TinyTeacher(0), nn.ReLU())).fingerprint
    assert other.fingerprint.weights_sha256 == ours.weights_sha256
    assert other.fingerprint.settings_sha256 != ours.settings_sha256


def test_settings_do_not_tell_where_in_memory_a_function_stands():
    class Scaled(nn.Module):
        def __init__(self, function) -> None:
            super().__init__()
            self.function = function

        def extra_repr(self):
            return repr(self.function)

    one, other = (ModuleTeacher("a", Scaled(lambda x: x)).fingerprint for _ in range(2))
    assert one == other


def test_the_digest_does_not_depend_on_memory_layout():
    module = nn.Linear(3, 3)
    turned = nn.Linear(3, 3)
    turned.load_state_dict(module.state_dict())
    turned.weight.data = turned.weight.data.t().contiguous().t()
    assert weights_digest(turned) == weights_digest(module)


def test_a_bfloat16_module_has_a_digest():
    assert weights_digest(TinyTeacher(0).bfloat16()) != weights_digest(TinyTeacher(0))


def test_a_digest_stays_what_it_was_in_earlier_releases():
    module = nn.Linear(2, 1)
    module.load_state_dict({"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([3.0])})
    assert weights_digest(module) == "38e015709bbd49eddd5a78c66bcd5f6a4c9ae19e1e4a76fd6370259e5a5926e1"


def test_a_live_teacher_survives_pickling_with_its_fingerprint():
    teacher = ModuleTeacher("a", TinyTeacher(3))
    again = pickle.loads(pickle.dumps(teacher))  # noqa: S301
    assert again.fingerprint == teacher.fingerprint


# Teachers of job files ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "teacher_factories.py").write_text(
        "import torch\n"
        "def linear(num_classes=5):\n"
        "    return torch.nn.Linear(4, num_classes)\n"
        "def text():\n"
        "    return 'no module'\n"
    )
    return tmp_path


@pytest.fixture(autouse=True)
def _forget_factories():
    yield
    sys.modules.pop("teacher_factories", None)


def sourced(folder, checkpoint=None, factory="teacher_factories:linear", **options) -> SourcedTeacher:
    source = TeacherSource.make(name="a", factory=factory, checkpoint=checkpoint)
    return SourcedTeacher(source, folder, **options)


def saved_weights():
    return {name: value.clone() for name, value in nn.Linear(4, 5).state_dict().items()}


def save_safetensors(folder, weights):
    save_file(weights, folder / "a.safetensors")
    return "a.safetensors"


def save_torch(folder, weights):
    torch.save(weights, folder / "a.pt")
    return "a.pt"


def save_wrapped(folder, weights):
    torch.save({"state_dict": weights, "epoch": 7}, folder / "a.ckpt")
    return "a.ckpt"


@pytest.mark.parametrize("save", [save_safetensors, save_torch, save_wrapped])
def test_weights_are_loaded_from_the_checkpoint(folder, save):
    weights = saved_weights()
    teacher = sourced(folder, save(folder, weights))
    assert torch.allclose(run(teacher), INPUTS @ weights["weight"].T + weights["bias"])


def test_the_same_weights_have_the_same_fingerprint_from_any_kind_of_file(folder):
    weights = saved_weights()
    one, other = sourced(folder, save_safetensors(folder, weights)), sourced(folder, save_torch(folder, weights))
    assert one.fingerprint == other.fingerprint


def test_a_sourced_teachers_fingerprint_names_its_factory(folder):
    assert sourced(folder, save_torch(folder, saved_weights())).fingerprint.source == "teacher_factories:linear"


def test_a_checkpoint_that_is_not_there_is_named_with_where_it_was_looked_for(folder):
    with pytest.raises(
        JobError, match=r"teacher 'a': there is no checkpoint .*missing\.safetensors\. Paths are relative"
    ):
        _ = sourced(folder, "missing.safetensors").fingerprint


def test_a_torch_checkpoint_that_is_not_there_is_named(folder):
    with pytest.raises(JobError, match=r"teacher 'a': there is no checkpoint .*missing\.pt"):
        _ = sourced(folder, "missing.pt").fingerprint


@pytest.mark.parametrize("save", [save_safetensors, save_torch])
def test_weights_that_do_not_fit_are_refused(folder, save):
    other = {"weight": torch.zeros(3, 4), "bias": torch.zeros(3)}
    with pytest.raises(JobError, match=r"cannot be loaded: [\s\S]*size mismatch for weight"):
        _ = sourced(folder, save(folder, other)).fingerprint


def test_weights_that_are_missing_from_the_checkpoint_are_refused(folder):
    with pytest.raises(JobError, match=r"cannot be loaded: [\s\S]*Missing key"):
        _ = sourced(folder, save_torch(folder, {"weight": torch.zeros(5, 4)})).fingerprint


@pytest.mark.parametrize("name", ["torn.safetensors", "torn.pt"])
def test_a_torn_checkpoint_is_refused(folder, name):
    (folder / name).write_bytes(b"torn")
    with pytest.raises(JobError, match=rf"checkpoint .*{name} cannot be loaded: .*Nothing was written"):
        _ = sourced(folder, name).fingerprint


class RunsCode:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('ran').touch()",)


def test_a_checkpoint_that_holds_code_is_refused(folder):
    torch.save({"weight": RunsCode()}, folder / "evil.pt")
    with pytest.raises(
        JobError, match=r"evil\.pt cannot be loaded: it holds more than tensors.*Save module.state_dict"
    ):
        _ = sourced(folder, "evil.pt").fingerprint


def test_code_in_a_checkpoint_never_runs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    torch.save({"weight": RunsCode()}, folder / "evil.pt")
    with pytest.raises(JobError):
        _ = sourced(folder, "evil.pt").fingerprint
    assert not (folder / "ran").exists()


def test_a_factory_that_gives_no_module_is_refused(folder):
    with pytest.raises(JobError, match=r"teacher_factories:text gave a str; a torch\.nn\.Module is needed"):
        _ = sourced(folder, factory="teacher_factories:text").fingerprint


def test_a_pickled_sourced_teacher_takes_no_weights_with_it(folder):
    teacher = sourced(folder, save_torch(folder, saved_weights()))
    _ = teacher.fingerprint
    assert len(pickle.dumps(teacher)) < 2000


def test_a_pickled_sourced_teacher_loads_the_same_weights_elsewhere(folder):
    teacher = sourced(folder, save_torch(folder, saved_weights()))
    again = pickle.loads(pickle.dumps(teacher))  # noqa: S301
    assert torch.equal(run(again), run(teacher))


@pytest.mark.parametrize("kind", ["live", "sourced"])
def test_teachers_of_both_kinds_are_what_a_build_needs(folder, kind):
    teachers = {"live": ModuleTeacher("a", nn.Identity()), "sourced": sourced(folder)}
    assert isinstance(teachers[kind], Teacher)


# Merged teachers ------------------------------------------------------------------------------------------------------


def merged(*modules, weights) -> MergedTeacher:
    return MergedTeacher(tuple(ModuleTeacher(f"m{index}", module) for index, module in enumerate(modules)), weights)


def test_a_merged_teacher_gives_the_weighted_mean_of_its_members_logits():
    one, other = TinyTeacher(0), TinyTeacher(1)
    expected = 0.25 * one(INPUTS) + 0.75 * other(INPUTS)
    assert torch.allclose(run(merged(one, other, weights=(0.25, 0.75))), expected, atol=1e-6)


def test_a_merged_teachers_mean_is_taken_in_float32():
    assert run(merged(TinyTeacher(0).bfloat16(), weights=(1.0,)), INPUTS.bfloat16()).dtype == torch.float32


def test_a_merged_teacher_keeps_the_digits_of_members_in_float64():
    one, other = TinyTeacher(0).double(), TinyTeacher(1).double()
    inputs = INPUTS.double()
    assert torch.equal(run(merged(one, other, weights=(0.25, 0.75)), inputs), 0.25 * one(inputs) + 0.75 * other(inputs))


def test_members_over_other_classes_cannot_be_merged():
    with pytest.raises(
        WrongClassCountError, match=r"teacher 'm1' gave logits of shape \(6, 7\), the\s+members before it"
    ):
        run(merged(TinyTeacher(0), TinyTeacher(1, num_classes=7), weights=(0.5, 0.5)))


def test_all_members_get_their_modes_back():
    members = [TinyTeacher(0).train(), TinyTeacher(1).train()]
    run(merged(*members, weights=(0.5, 0.5)))
    assert [member.training for member in members] == [True, True]
