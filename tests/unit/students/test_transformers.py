"""transformers' own Trainer with soft targets in the loss: tiny models, real datasets, real collators."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_caches import build_tiny
from torch import nn

import kdcache
from kdcache import TransferSet
from kdcache.errors import InputMismatchError, OptionError, ShapeError, UnknownExampleError

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")

from kdcache.students.transformers import TrainerWithSoftTargets  # noqa: E402 - it needs transformers

NUM_CLASSES = 8
NUM_EXAMPLES = 24
LENGTHS = [3 + index % 4 for index in range(NUM_EXAMPLES)]
PAD = 0


class TokenTeacher(nn.Module):
    """A language model whose logits are a row of a table for each token: a wrong row is another row."""

    def __init__(self) -> None:
        super().__init__()
        table = torch.randn(NUM_CLASSES, NUM_CLASSES, generator=torch.Generator().manual_seed(7))
        self.register_buffer("table", table)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table[tokens]


def tokens_of(index: int) -> list[int]:
    generator = torch.Generator().manual_seed(index)
    return torch.randint(1, NUM_CLASSES, (LENGTHS[index],), generator=generator).tolist()


def name_of(index: int) -> str:
    return f"text-{index}"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    padded = nn.utils.rnn.pad_sequence([torch.tensor(tokens_of(index)) for index in range(NUM_EXAMPLES)], True)
    order = [(7 * place + 3) % NUM_EXAMPLES for place in range(NUM_EXAMPLES)]
    transfer_set = TransferSet.from_arrays(
        padded[order], example_ids=[name_of(index) for index in order], num_rows=[LENGTHS[index] for index in order]
    )
    return build_tiny(tmp_path_factory.mktemp("texts") / "cache", transfer_set, {"table": TokenTeacher()})


@pytest.fixture(scope="module")
def labelled_texts(tmp_path_factory):
    """One row a text: the logits of its first token. Labels and ids are numbers."""
    inputs = torch.tensor([tokens_of(index)[0] for index in range(NUM_EXAMPLES)])
    labels = [index % NUM_CLASSES for index in range(NUM_EXAMPLES)]
    transfer_set = TransferSet.from_arrays(inputs, labels=labels)
    return build_tiny(tmp_path_factory.mktemp("labelled") / "cache", transfer_set, {"table": TokenTeacher()})


def text_dataset(indices=range(NUM_EXAMPLES), **columns):
    return datasets.Dataset.from_dict(
        {
            "example_id": [name_of(index) for index in indices],
            "input_ids": [tokens_of(index) for index in indices],
            "source": ["somewhere"] * len(indices),
            **columns,
        }
    )


def labelled_dataset(**columns):
    return text_dataset(
        **{
            "example_id": list(range(NUM_EXAMPLES)),
            "labels": [index % NUM_CLASSES for index in range(NUM_EXAMPLES)],
            **columns,
        }
    )


def padded_batch(examples, *, side="right"):
    """Pads tokens, and gives a causal model's labels, as a language model's collator does."""
    width = max(len(example["input_ids"]) for example in examples)

    def padded(example, value, fill):
        gap = [fill] * (width - len(example["input_ids"]))
        return gap + value if side == "left" else value + gap

    batch = {
        "input_ids": torch.tensor([padded(example, example["input_ids"], PAD) for example in examples]),
        "attention_mask": torch.tensor([padded(example, [1] * len(example["input_ids"]), 0) for example in examples]),
    }
    if "labels" in examples[0]:
        return {**batch, "labels": torch.tensor([example["labels"] for example in examples])}
    return {**batch, "labels": torch.tensor([padded(example, example["input_ids"], -100) for example in examples])}


def padded_left(examples):
    return padded_batch(examples, side="left")


def unlabelled_batch(examples):
    return {name: value for name, value in padded_batch(examples).items() if name != "labels"}


def causal_model(num_classes=NUM_CLASSES):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=num_classes, n_positions=16, n_embd=16, n_layer=2, n_head=2, embd_pdrop=0, attn_pdrop=0,
        resid_pdrop=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def classifier(num_classes=NUM_CLASSES):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=NUM_CLASSES, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, num_labels=num_classes, hidden_dropout_prob=0, attention_probs_dropout_prob=0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


@pytest.fixture
def train(tmp_path):
    """Makes a trainer; what it is not told is small, quiet and on the processor."""

    def make(model, dataset, *, cache, arguments=None, kind=TrainerWithSoftTargets, **options):
        defaults = {
            "output_dir": str(tmp_path / "run"), "use_cpu": True, "report_to": [], "disable_tqdm": True,
            "per_device_train_batch_size": 4, "num_train_epochs": 1, "logging_steps": 1, "save_strategy": "no",
            "learning_rate": 1e-2, "lr_scheduler_type": "constant", "dataloader_pin_memory": False,
        }  # fmt: skip
        given = {} if kind is not TrainerWithSoftTargets else {"cache": cache, "temperature": 2.0, "soft_weight": 0.3}
        return kind(
            model,
            transformers.TrainingArguments(**{**defaults, **(arguments or {})}),
            train_dataset=dataset,
            **{"data_collator": padded_batch, **given, **options},
        )

    return make


def first_step(trainer, num_batches=1):
    """Give the losses of the first step's batches, unshuffled, and what Trainer made of their items."""
    trainer._get_train_sampler = lambda *_: None
    loader = trainer.get_train_dataloader()
    batches, num_items = trainer.get_batch_samples(iter(loader), num_batches, torch.device("cpu"))
    trainer.model.train()
    return [trainer.compute_loss(trainer.model, batch, num_items_in_batch=num_items) for batch in batches]


def soft_terms(model, indices, *, num_classes=NUM_CLASSES, temperature=2.0):
    """Give the soft term of every row of some texts, one text at a time: no padding, no cache, no Trainer."""
    table = TokenTeacher().table
    rows = []
    for index in indices:
        tokens = torch.tensor([tokens_of(index)])
        student = model(tokens).logits[0, :, :num_classes]
        teacher = table[tokens[0]]
        rows.append(
            temperature**2
            * nn.functional.kl_div(
                (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1), reduction="none"
            ).sum(-1)
        )
    return rows


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# The loss -------------------------------------------------------------------------------------------------------------


def test_a_causal_models_loss_is_both_terms(texts, train):
    (loss,) = first_step(train(causal_model(), text_dataset(), cache=texts))
    (own,) = first_step(train(causal_model(), text_dataset(), cache=texts, kind=transformers.Trainer))
    soft = torch.cat(soft_terms(causal_model(), range(4))).mean()
    torch.testing.assert_close(loss, 0.3 * soft + 0.7 * own)


def test_padding_at_the_left_meets_the_same_rows(texts, train):
    model = causal_model()
    trainer = train(model, text_dataset(), cache=texts, data_collator=padded_left, soft_weight=1.0)
    (loss,) = first_step(trainer)
    logits = model(**padded_left([{"input_ids": tokens_of(index)} for index in range(4)])).logits
    rows = [logits[index, -LENGTHS[index] :] for index in range(4)]
    expected = kdcache.distillation_loss(
        torch.cat(rows), texts.read([name_of(index) for index in range(4)]), temperature=2.0, soft_weight=1.0
    )
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_classifiers_loss_is_both_terms(labelled_texts, train, label_smoothing):
    arguments = {"label_smoothing_factor": label_smoothing}
    dataset = labelled_dataset()
    (loss,) = first_step(train(classifier(), dataset, cache=labelled_texts, arguments=arguments))
    (own,) = first_step(
        train(classifier(), dataset, cache=labelled_texts, arguments=arguments, kind=transformers.Trainer)
    )
    batch = padded_batch([{"input_ids": tokens_of(index)} for index in range(4)])
    logits = classifier()(batch["input_ids"], batch["attention_mask"]).logits
    soft = kdcache.distillation_loss(logits, labelled_texts.read([0, 1, 2, 3]), temperature=2.0, soft_weight=1.0)
    torch.testing.assert_close(loss, 0.3 * soft + 0.7 * own)


def doubled_loss(outputs, labels, num_items_in_batch=None):
    flat = labels.flatten()
    return 2 * nn.functional.cross_entropy(outputs.logits.flatten(0, 1), flat, reduction="sum") / num_items_in_batch


def test_a_loss_function_of_ones_own_is_the_hard_term(texts, train):
    options = {"cache": texts, "compute_loss_func": doubled_loss}
    losses = first_step(train(causal_model(), text_dataset(), **options), num_batches=2)
    own = first_step(train(causal_model(), text_dataset(), kind=transformers.Trainer, **options), num_batches=2)
    soft = torch.cat(soft_terms(causal_model(), range(8))).mean()
    torch.testing.assert_close(sum(losses), 0.3 * soft + 0.7 * sum(own))


def test_without_a_hard_term_no_labels_are_needed(labelled_texts, train):
    dataset = labelled_dataset().remove_columns("labels")
    trainer = train(classifier(), dataset, cache=labelled_texts, data_collator=unlabelled_batch, soft_weight=1.0)
    trainer.train()
    assert losses_of(trainer)[-1] < losses_of(trainer)[0]


def test_without_a_soft_term_it_is_the_plain_trainer(texts, train):
    ours = train(causal_model(), text_dataset(), cache=texts, soft_weight=0.0)
    plain = train(causal_model(), text_dataset(), cache=texts, kind=transformers.Trainer)
    ours.train()
    plain.train()
    assert losses_of(ours) == losses_of(plain)


def test_the_soft_term_of_accumulated_batches_is_the_mean_over_all_their_rows(texts, train):
    losses = first_step(train(causal_model(), text_dataset(), cache=texts, soft_weight=1.0), num_batches=3)
    expected = torch.cat(soft_terms(causal_model(), range(12))).mean()
    torch.testing.assert_close(sum(losses), expected)


def test_accumulated_batches_train_as_one_batch_of_them_all(texts, train):
    one, other = causal_model(), causal_model()
    train(one, text_dataset(), cache=texts, arguments={"per_device_train_batch_size": 8}).train()
    accumulated = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    train(other, text_dataset(), cache=texts, arguments=accumulated).train()
    for parameter, same in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter, same, atol=2e-4, rtol=2e-3)


def test_batches_whose_losses_trainer_averages_have_means_of_their_own(labelled_texts, train):
    model = classifier()
    trainer = train(model, labelled_dataset(), cache=labelled_texts, soft_weight=1.0)
    trainer.model_accepts_loss_kwargs = False
    losses = first_step(trainer, num_batches=2)
    batch = padded_batch([{"input_ids": tokens_of(index)} for index in range(4, 8)])
    logits = model(batch["input_ids"], batch["attention_mask"]).logits
    expected = kdcache.distillation_loss(logits, labelled_texts.read([4, 5, 6, 7]), temperature=2.0, soft_weight=1.0)
    torch.testing.assert_close(losses[1], expected)


def masked_prompt(examples):
    """Takes the label off the first two tokens of every text."""
    batch = padded_batch(examples)
    batch["labels"][:, :2] = -100
    return batch


def test_rows_without_a_label_can_be_left_out(texts, train):
    trainer = train(
        causal_model(), text_dataset(), cache=texts, data_collator=masked_prompt, soft_weight=1.0,
        unlabelled_rows="ignore",
    )  # fmt: skip
    (loss,) = first_step(trainer)
    rows = soft_terms(causal_model(), range(4))
    torch.testing.assert_close(loss, torch.cat([row[1:-1] for row in rows]).mean())


def test_rows_without_a_label_teach_by_default(texts, train):
    trainer = train(causal_model(), text_dataset(), cache=texts, data_collator=masked_prompt, soft_weight=1.0)
    torch.testing.assert_close(first_step(trainer)[0], torch.cat(soft_terms(causal_model(), range(4))).mean())


def test_a_wider_vocabulary_is_refused(texts, train):
    trainer = train(causal_model(num_classes=12), text_dataset(), cache=texts)
    with pytest.raises(ShapeError, match=r"gives 12 classes, the teachers of cache .* 8\..*extra_classes='ignore'"):
        first_step(trainer)


def test_a_wider_vocabularys_last_classes_can_be_left_out(texts, train):
    trainer = train(causal_model(num_classes=12), text_dataset(), cache=texts, soft_weight=1.0, extra_classes="ignore")
    torch.testing.assert_close(first_step(trainer)[0], torch.cat(soft_terms(causal_model(12), range(4))).mean())


def test_a_narrower_student_is_refused(labelled_texts, train):
    model, dataset = classifier(num_classes=5), labelled_dataset().remove_columns("labels")
    trainer = train(model, dataset, cache=labelled_texts, data_collator=unlabelled_batch, soft_weight=1.0)
    with pytest.raises(ShapeError, match=r"gives 5 classes, the teachers of cache .* 8\. A student needs all"):
        first_step(trainer)


def target_batch(examples):
    """Sources that are longer than their targets, and padded at the left; targets are the texts."""
    batch = padded_batch(examples)
    sources = [[0] * 4 + [1] * len(example["input_ids"]) for example in examples]
    width = max(len(source) for source in sources)
    mask = torch.tensor([[0] * (width - len(source)) + source for source in sources])
    return {"input_ids": mask.clone(), "attention_mask": mask, "labels": batch["labels"]}


def test_an_encoder_decoders_rows_are_its_targets(texts, train):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=NUM_CLASSES, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_decoder_layers=1, num_heads=2,
        dropout_rate=0, decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    trainer = train(
        model, text_dataset(), cache=texts, data_collator=target_batch, soft_weight=1.0, unlabelled_rows="ignore"
    )
    (loss,) = first_step(trainer)
    logits = model(**target_batch([{"input_ids": tokens_of(index)} for index in range(4)])).logits
    rows = [logits[index, : LENGTHS[index]] for index in range(4)]
    expected = kdcache.distillation_loss(
        torch.cat(rows), texts.read([name_of(index) for index in range(4)]), temperature=2.0, soft_weight=1.0
    )
    torch.testing.assert_close(loss, expected)


# Columns and ids ------------------------------------------------------------------------------------------------------


def test_a_student_comes_close_to_its_teacher_under_shuffling(texts, train):
    trainer = train(causal_model(), text_dataset(), cache=texts, soft_weight=1.0, arguments={"num_train_epochs": 8})
    trainer.train()
    assert losses_of(trainer)[-1] < 0.2 * losses_of(trainer)[0]


def test_a_collator_may_be_changed_later(texts, train):
    trainer = train(causal_model(), text_dataset(), cache=texts, soft_weight=1.0)
    trainer.data_collator = padded_left
    reference = train(causal_model(), text_dataset(), cache=texts, soft_weight=1.0, data_collator=padded_left)
    assert first_step(trainer) == first_step(reference)


def test_columns_may_all_be_kept(texts, train):
    arguments = {"remove_unused_columns": False}
    (loss,) = first_step(train(causal_model(), text_dataset(), cache=texts, arguments=arguments))
    (expected,) = first_step(train(causal_model(), text_dataset(), cache=texts))
    assert loss == expected


def test_workers_of_the_dataloader_change_nothing(texts, train):
    arguments = {"dataloader_num_workers": 2}
    (loss,) = first_step(train(causal_model(), text_dataset(), cache=texts, arguments=arguments))
    (expected,) = first_step(train(causal_model(), text_dataset(), cache=texts))
    assert loss == expected


def test_a_plain_list_of_examples_is_a_dataset(texts, train):
    (loss,) = first_step(train(causal_model(), list(text_dataset()), cache=texts))
    (expected,) = first_step(train(causal_model(), text_dataset(), cache=texts))
    assert loss == expected


def test_a_dataset_without_ids_says_so(texts, train):
    dataset = text_dataset().remove_columns("example_id")
    with pytest.raises(OptionError, match=r"training batch 1 .* no ids under key='example_id'.*'input_ids', 'source'"):
        train(causal_model(), dataset, cache=texts).train()


def test_unknown_ids_are_refused_at_the_first_batch(texts, train):
    dataset = text_dataset(example_id=[f"other-{index}" for index in range(NUM_EXAMPLES)])
    with pytest.raises(UnknownExampleError, match="training batch 1 of TrainerWithSoftTargets"):
        train(causal_model(), dataset, cache=texts).train()


def test_other_labels_are_refused(labelled_texts, train):
    dataset = labelled_dataset(labels=[0] * NUM_EXAMPLES)
    with pytest.raises(InputMismatchError, match=r"training batch 1 .* labels differ"):
        first_step(train(classifier(), dataset, cache=labelled_texts))


def test_other_labels_can_be_trained_on_where_it_is_said(labelled_texts, train):
    dataset = labelled_dataset(labels=[0] * NUM_EXAMPLES)
    (loss,) = first_step(train(classifier(), dataset, cache=labelled_texts, label_key=None))
    assert loss.isfinite()


def test_texts_cut_shorter_than_they_were_cached_are_refused(texts, train):
    dataset = text_dataset(input_ids=[tokens_of(index)[:2] for index in range(NUM_EXAMPLES)])
    with pytest.raises(ShapeError, match=r"example 'text-0' has 2 tokens, and 3 rows in the cache"):
        first_step(train(causal_model(), dataset, cache=texts))


def test_hidden_padding_at_the_left_is_refused(texts, train):
    def without_mask(examples):
        return {name: value for name, value in padded_left(examples).items() if name != "attention_mask"}

    vocabulary = tokenizers.models.WordLevel({"[PAD]": 0}, unk_token="[PAD]")  # noqa: S106 - a word, no secret
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(vocabulary), padding_side="left"
    )
    trainer = train(causal_model(), text_dataset(), cache=texts, data_collator=without_mask, processing_class=tokenizer)
    with pytest.raises(OptionError, match="the tokenizer pads at the left, and the batch has no attention_mask"):
        first_step(trainer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extra_classes": "cut"}, "extra_classes"),
        ({"unlabelled_rows": "drop"}, "unlabelled_rows"),
        ({"soft_weight": 1.5}, "soft_weight must lie between 0 and 1"),
    ],
)
def test_options_out_of_their_range_are_refused_at_once(texts, train, options, message):
    with pytest.raises(OptionError, match=message):
        train(causal_model(), text_dataset(), cache=texts, **options)


def test_a_training_batch_that_went_another_way_is_refused(texts, train):
    trainer = train(causal_model(), text_dataset(), cache=texts)
    with pytest.raises(OptionError, match="a training batch without soft targets"):
        trainer.compute_loss(trainer.model.train(), padded_batch([{"input_ids": tokens_of(0)}]))


# Evaluation, saving, going on -----------------------------------------------------------------------------------------


def test_evaluation_is_the_models_own_loss_on_any_examples(texts, train):
    others = text_dataset(example_id=[f"other-{index}" for index in range(NUM_EXAMPLES)])
    ours = train(causal_model(), text_dataset(), cache=texts, eval_dataset=others).evaluate()
    plain = train(
        causal_model(), text_dataset(), cache=texts, kind=transformers.Trainer, eval_dataset=others
    ).evaluate()
    assert ours["eval_loss"] == plain["eval_loss"]


def test_prediction_needs_no_ids(texts, train):
    predicted = train(causal_model(), text_dataset(), cache=texts).predict(
        text_dataset([1, 5, 9]).remove_columns("example_id")
    )
    assert predicted.predictions.shape == (3, 4, NUM_CLASSES)


def test_a_run_that_is_resumed_within_an_epoch_has_the_losses_of_an_undisturbed_one(texts, train):
    arguments = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "linear"}
    undisturbed = train(causal_model(), text_dataset(), cache=texts, arguments=arguments)
    undisturbed.train()
    checkpoint = f"{undisturbed.args.output_dir}/checkpoint-4"
    resumed = train(causal_model(), text_dataset(), cache=texts, arguments=arguments)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert losses_of(resumed) == losses_of(undisturbed)


# Several processes ----------------------------------------------------------------------------------------------------


def trained_by_ranks(texts, folder, *, num_ranks, batch_size):
    kept = folder / f"{num_ranks}.pt"
    program = Path(__file__).with_name("trainer_of_ranks.py")
    folders = (str(program.parent), str(Path(__file__).parents[2]), str(Path(__file__).parents[3]))
    subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}",
            str(program), texts.address, str(batch_size), str(kept),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        check=True,
        capture_output=True,
        timeout=300,
    )  # fmt: skip
    return torch.load(kept)


@pytest.mark.slow
def test_two_ranks_train_the_same_model_as_one(texts, tmp_path):
    together = trained_by_ranks(texts, tmp_path, num_ranks=2, batch_size=2)
    alone = trained_by_ranks(texts, tmp_path, num_ranks=1, batch_size=4)
    assert (together["world_size"], alone["world_size"]) == (2, 1)
    torch.testing.assert_close(together["weights"], alone["weights"], rtol=1e-4, atol=1e-5)
