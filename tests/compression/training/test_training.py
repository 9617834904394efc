"""Training by the objective: against plain loops, stopped, killed, and gone on with."""

import dataclasses
import json
import math
import random

import numpy as np
import pytest
import torch
from checkpoints import transformers_model
from hypothesis import given
from hypothesis import strategies as st
from processes import killed_at
from teachers import teacher_outputs
from torch.nn import functional

import compression
from compression.checkpoints import base
from compression.errors import RecipeError, TrainingError
from compression.files.atomic import locked
from compression.training.downstream import Texts
from compression.training.settings import Objective, Settings
from compression.training.trainer import train

IDS = torch.randint(48, (8, 10), generator=torch.Generator().manual_seed(0))
KD = Objective(alpha=0.3, temperature=4.0)  # of [O]
PLAIN = Objective(alpha=0, temperature=1)
WHOLE = Settings(epochs=3, learning_rate=1e-3, batch=8, accumulation=1, clip=0.5)
PARTS = Settings(epochs=3, learning_rate=1e-3, batch=2, accumulation=2, clip=0.5, save_steps=2)


def student(dtype=torch.float32):
    return transformers_model("LlamaForCausalLM", dtype=dtype)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A base that says something else than the student."""
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    model = transformers_model("LlamaForCausalLM", hidden_size=48)
    model.lm_head.weight.data *= 20
    model.save_pretrained(folder)
    base.byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def outputs(teacher, tmp_path):
    return teacher_outputs(tmp_path / "teachers", teacher, IDS)


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def plain_loop(model, loss_of, settings):
    """AdamW with a linear schedule on all texts at once; the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / settings.epochs)
    losses = []
    for _ in range(settings.epochs):
        loss = loss_of(model(IDS).logits[:, :-1].flatten(0, 1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_losses_and_weights_are_those_of_a_loop_that_runs_the_teacher_in_every_step(teacher, outputs, tmp_path):
    theirs, ours, labels = compression.open_base(teacher).model, student(), IDS[:, 1:].flatten()

    def textbook(z):
        with torch.no_grad():
            t = theirs(IDS).logits[:, :-1].flatten(0, 1)
        log_q, p = functional.log_softmax(z / 4, -1), functional.softmax(t / 4, -1)
        return 0.7 * functional.cross_entropy(z, labels) + 0.3 * 16 * functional.kl_div(log_q, p, reduction="batchmean")

    plain = student()
    want = plain_loop(plain, textbook, WHOLE)
    found = train(ours, IDS, KD, WHOLE, tmp_path / "runs", teacher=outputs)

    assert want == pytest.approx(found.losses, abs=1e-4)
    assert found.losses[-1] < found.losses[0]
    torch.testing.assert_close(weights(plain), weights(ours), rtol=1e-3, atol=1e-5)


def test_alpha_0_is_the_training_of_transformers(tmp_path):
    from torch.utils.data import Dataset
    from transformers import Trainer, TrainingArguments

    class Texts(Dataset):
        def __len__(self):
            return len(IDS)

        def __getitem__(self, i):
            return {"input_ids": IDS[i], "labels": IDS[i]}

    theirs, ours = student(), student()
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "theirs"), num_train_epochs=3, learning_rate=1e-3, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, max_grad_norm=0.5, seed=0, use_cpu=True, report_to=[], disable_tqdm=True,
        save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    Trainer(theirs, arguments, train_dataset=Texts()).train()
    train(ours, IDS, PLAIN, PARTS, tmp_path / "runs")

    torch.testing.assert_close(weights(theirs), weights(ours), rtol=1e-4, atol=1e-6)
    assert (weights(student())["lm_head.weight"] - weights(ours)["lm_head.weight"]).abs().max() > 1e-3


CHILD = f"""
import sys
import torch
from checkpoints import transformers_model
from compression.training.settings import Objective, Settings
from compression.training.trainer import train
from teachers import teacher_outputs
IDS, KD, PARTS = torch.tensor({IDS.tolist()}), {KD!r}, {PARTS!r}
outputs = teacher_outputs(sys.argv[1], sys.argv[2], IDS)
def progress(done, total, what):
    print(done, flush=True)
    if done == 4:
        sys.stdin.read()  # until killed: step 3 is done and step 4 not saved yet
student = transformers_model("LlamaForCausalLM")
train(student, IDS, KD, PARTS, sys.argv[3], teacher=outputs, progress=progress)
"""


@pytest.mark.process
def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_been(teacher, outputs, tmp_path):
    runs = tmp_path / "runs"
    killed_at(4, CHILD, tmp_path / "teachers", teacher, runs)
    steps, resumed, whole = [], student(), student()

    again = train(resumed, IDS, KD, PARTS, runs, teacher=outputs, progress=lambda *step: steps.append(step[:2]))
    undisturbed = train(whole, IDS, KD, PARTS, tmp_path / "other", teacher=outputs)

    assert [(3, 6), (4, 6), (5, 6), (6, 6)] == steps
    assert undisturbed.losses == again.losses
    torch.testing.assert_close(weights(whole), weights(resumed), rtol=0, atol=0)


def test_a_finished_run_is_read_and_not_trained_again(outputs, tmp_path):
    first, second, steps = student(), student(), []
    before = train(first, IDS, KD, PARTS, tmp_path / "runs", teacher=outputs)
    after = train(second, IDS, KD, PARTS, tmp_path / "runs", teacher=outputs, progress=lambda *step: steps.append(step))

    assert (before, []) == (after, steps)
    torch.testing.assert_close(weights(first), weights(second), rtol=0, atol=0)
    assert ["checkpoint-6"] == [path.name for path in before.folder.glob("checkpoint-*")]


def test_other_settings_weights_and_texts_are_other_runs(tmp_path):
    settings = {"epochs": 1, "learning_rate": 1e-3, "batch": 8, "accumulation": 1, "clip": 1.0}
    other = student()
    other.lm_head.weight.data[0, 0] += 1
    calls = (
        (student(), IDS, PLAIN, settings),
        (student(), IDS, PLAIN, settings | {"seed": 1}),
        (student(), IDS, PLAIN, settings | {"clip": 0.5}),
        (student(), IDS.flip(0), PLAIN, settings),
        (other, IDS, PLAIN, settings),
    )
    folders = {train(*call, Settings(**values), tmp_path / "runs").folder for *call, values in calls}

    assert len(calls) == len(folders)


def test_padding_is_not_learnt_from(tmp_path):
    mask = torch.ones_like(IDS)
    mask[:, 6:] = 0
    other = torch.where(mask.bool(), IDS, (IDS + 7) % 48)
    first, second = student(), student()
    train(first, Texts(IDS, mask), PLAIN, WHOLE, tmp_path / "runs")
    train(second, Texts(other, mask), PLAIN, WHOLE, tmp_path / "runs")

    changed = [name for name, weight in weights(first).items() if not torch.equal(weight, weights(second)[name])]
    assert [] == changed


def test_what_is_read_and_not_learnt_has_no_loss(tmp_path):
    learn = torch.ones_like(IDS)
    learn[:, :6] = 0
    plain, ours = student(), student()

    want = plain_loop(plain, lambda z: functional.cross_entropy(z.view(8, 9, -1)[:, 5:].flatten(0, 1),
                                                                IDS[:, 6:].flatten()), WHOLE)  # fmt: skip
    found = train(ours, Texts(IDS, learn=learn), PLAIN, WHOLE, tmp_path / "runs")

    assert want == pytest.approx(found.losses, abs=1e-5)
    assert found.folder != train(student(), IDS, PLAIN, WHOLE, tmp_path / "runs").folder


def test_a_student_of_bf16_is_trained_in_fp32_and_given_back(tmp_path):
    ours, exact = student(torch.bfloat16), student(torch.bfloat16).float()
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    train(ours, IDS, PLAIN, WHOLE, tmp_path / "runs")
    train(exact, IDS, PLAIN, WHOLE, tmp_path / "runs")

    rounded = {name: weight.bfloat16() for name, weight in weights(exact).items()}
    torch.testing.assert_close(rounded, weights(ours), rtol=0, atol=0)
    assert (False, False) == (ours.training, any(parameter.requires_grad for parameter in ours.parameters()))
    assert state == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_products_can_be_in_bf16(tmp_path):
    exact = train(student(), IDS, PLAIN, WHOLE, tmp_path / "runs").losses
    found = train(student(), IDS, PLAIN, dataclasses.replace(WHOLE, bf16=True), tmp_path / "runs").losses

    assert exact != found
    assert exact == pytest.approx(found, rel=0.01)


def test_the_optimizer_can_keep_its_state_in_8_bits(tmp_path):
    """Below 4,096 numbers bitsandbytes keeps it in 32 bits, hence wider layers."""
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    exact, low = (transformers_model("LlamaForCausalLM", **sizes) for _ in range(2))
    losses = train(exact, IDS, PLAIN, WHOLE, tmp_path / "runs").losses
    found = train(low, IDS, PLAIN, dataclasses.replace(WHOLE, optimizer="adamw_8bit"), tmp_path / "runs").losses

    assert losses == pytest.approx(found, rel=1e-3)
    assert not torch.equal(exact.lm_head.weight, low.lm_head.weight)


def test_two_processes_are_not_in_one_run(tmp_path):
    folder = train(student(), IDS, PLAIN, WHOLE, tmp_path / "runs").folder
    with locked(folder, TrainingError, "busy"), pytest.raises(TrainingError, match="another process is training in"):
        train(student(), IDS, PLAIN, WHOLE, tmp_path / "runs")


def test_weights_that_ask_for_no_gradient_stay(tmp_path):
    ours = student().requires_grad_(False)
    ours.model.layers[1].requires_grad_(True)
    before = weights(ours)
    train(ours, IDS, PLAIN, WHOLE, tmp_path / "runs")

    changed = {name for name, weight in weights(ours).items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if name.startswith("model.layers.1.")}


def test_a_loss_that_is_not_finite_stops_the_run_and_the_checkpoint_before_it_stays(tmp_path):
    settings = Settings(epochs=9, learning_rate=1e36, batch=8, accumulation=1, clip=1.0, save_steps=1)
    with pytest.raises(TrainingError, match=r"the loss of step [2-9] is (nan|inf); .* lower the learning rate"):
        train(student(), IDS, PLAIN, settings, tmp_path / "runs")

    (checkpoint,) = tmp_path.glob("runs/*/checkpoint-*")
    sealed = json.loads((checkpoint.parent / "run.json").read_text())["files"]
    assert {f"{checkpoint.name}/{path.name}" for path in checkpoint.iterdir()} == sealed.keys()


def test_a_gradient_that_is_not_finite_is_not_applied(tmp_path):
    ours = student()
    before = weights(ours)
    ours.lm_head.weight.register_hook(lambda gradient: gradient / 0)
    with pytest.raises(TrainingError, match=r"the gradient of step 1 is (nan|inf)"):
        train(ours, IDS, PLAIN, WHOLE, tmp_path / "runs")

    torch.testing.assert_close(before, weights(ours), rtol=0, atol=0)


def test_a_checkpoint_without_its_seal_does_not_count_and_a_damaged_one_is_refused(tmp_path):
    first = train(student(), IDS, PLAIN, PARTS, tmp_path / "runs")
    (first.folder / "checkpoint-9").mkdir()
    assert first == train(student(), IDS, PLAIN, PARTS, tmp_path / "runs")
    assert not (first.folder / "checkpoint-9").exists()

    path = first.folder / "checkpoint-6" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(
        TrainingError, match=r"checkpoint-6/model\.safetensors is corrupt: its SHA-256 does not match; delete"
    ):
        train(student(), IDS, PLAIN, PARTS, tmp_path / "runs")
    (first.folder / "run.json").write_text("{}")
    with pytest.raises(TrainingError, match="was made with another student"):
        train(student(), IDS, PLAIN, PARTS, tmp_path / "runs")


def as_schema_1_wrote_it(folder):
    """The same run with a file of digests in each checkpoint, and its end in a file of its own."""
    seal = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(seal["identity"]))
    for checkpoint in folder.glob("checkpoint-*"):
        digests = {path.name: seal["files"][f"{checkpoint.name}/{path.name}"] for path in checkpoint.iterdir()}
        digests["finished.json"] = "0" * 64  # it saved the last checkpoint of some runs twice, and this file with it
        (checkpoint / "finished.json").write_text(json.dumps(digests))
    if "best" in seal:
        (folder / "best.json").write_text(json.dumps({"checkpoint": seal["best"], "losses": seal["losses"]}))


@pytest.mark.parametrize("patience", [0, 1])
def test_a_run_that_an_earlier_version_left_is_read_checked_and_resumed(tmp_path, patience):
    settings, steps = dataclasses.replace(PARTS, patience=patience), []
    first, second = student(), student()
    before = train(first, IDS, PLAIN, settings, tmp_path / "runs")
    as_schema_1_wrote_it(before.folder)

    def again(student):
        return train(student, IDS, PLAIN, settings, tmp_path / "runs", progress=lambda *step: steps.append(step))

    assert (before, []) == (again(second), steps)
    torch.testing.assert_close(weights(first), weights(second), rtol=0, atol=0)
    (checkpoint,) = before.folder.glob(f"checkpoint-{len(before.losses)}")
    (checkpoint / "model.safetensors").write_bytes(b"!")
    with pytest.raises(TrainingError, match=r"model\.safetensors is corrupt: its SHA-256 does not match; delete"):
        again(student())
    if not patience:
        (checkpoint / "finished.json").unlink()  # it does not count, and there is no other
        assert before.losses == again(student()).losses
        assert len(before.losses) == len(steps)


def test_what_cannot_be_trained_is_refused_before_anything_is_made(outputs, tmp_path):
    for arguments, words in (
        ((IDS[:3], PLAIN, PARTS), r"one step takes 2 x 2 = 4 texts, and there are 3"),
        ((IDS[:, :1], PLAIN, PARTS), "texts of 1 tokens have no next token"),
        ((IDS.float(), PLAIN, PARTS), "token ids must be integers"),
        ((IDS, KD, PARTS), "alpha=0.3 needs a teacher's outputs"),
    ):
        with pytest.raises(TrainingError, match=words):
            train(student(), *arguments, tmp_path / "runs")
    with pytest.raises(TrainingError, match="are of other texts than the student is given"):
        train(student(), (IDS + 1) % 48, KD, PARTS, tmp_path / "runs", teacher=outputs)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epochs": 0}, "epochs=0: must be at least 1"),
        ({"warmup": -0.1}, r"warmup=-0.1: allowed are 0 \(none\) to below 1, a share of the steps"),
        ({"warmup": 5}, "warmup=5: allowed are .* a share of the steps"),
        ({"warmup": float("nan")}, "warmup=nan"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: must be above 0"),
        ({"clip": float("nan")}, "clip=nan"),
        ({"optimizer": "sgd"}, "optimizer='sgd': allowed are adamw, adamw_8bit"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, words):
    with pytest.raises(RecipeError, match=words):
        Settings(**{"epochs": 1, "learning_rate": 1e-3, "batch": 4, "accumulation": 1, "clip": 1.0} | change)


@given(
    warmup=st.floats(0, 1, exclude_max=True), texts=st.integers(1, 300), batch=st.integers(1, 5),
    accumulation=st.integers(1, 5), epochs=st.integers(1, 4), patience=st.integers(0, 1),
)  # fmt: skip
def test_a_warm_up_that_is_not_refused_ends_before_the_last_step(warmup, texts, batch, accumulation, epochs, patience):
    settings = Settings(epochs=epochs, learning_rate=1e-3, batch=batch, accumulation=accumulation, clip=1.0,
                        warmup=warmup, patience=patience)  # fmt: skip
    steps = epochs * math.ceil(math.ceil((texts - settings.held_out(texts)) / batch) / accumulation)
    taken = math.ceil(warmup * steps)

    if taken == 0 or taken < steps:
        settings.check_warmup(texts)
    else:
        with pytest.raises(RecipeError, match=rf"of {steps} steps over {texts} texts it takes {taken}, so that it"):
            settings.check_warmup(texts)


def test_the_learning_rate_rises_over_its_share_of_the_steps_and_falls_to_zero(tmp_path, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step

    def recorded(optimizer, *args, **kwargs):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    settings = Settings(epochs=5, learning_rate=1.0e-3, batch=4, accumulation=1, clip=1.0, warmup=0.3)
    trained = train(student(), IDS, Objective(alpha=0, temperature=1), settings, tmp_path / "runs")

    steps = len(trained.losses)
    rise = math.ceil(0.3 * steps)
    expected = [at / rise if at < rise else (steps - at) / (steps - rise) for at in range(steps)]
    assert rates == pytest.approx([1e-3 * each for each in expected])


# --- Texts held out ---------------------------------------------------------------------------------------------------

MANY = torch.randint(48, (24, 10), generator=torch.Generator().manual_seed(1))
STOPPING = Settings(epochs=12, learning_rate=0.03, batch=4, accumulation=1, clip=1.0, patience=2)


def held_out_loss(model):
    """The plain loss of the texts that are held out, the last four."""
    with torch.no_grad():
        logits = model(MANY[-4:]).logits
    return float(functional.cross_entropy(logits[:, :-1].flatten(0, 1), MANY[-4:, 1:].flatten()))


def test_training_stops_where_texts_held_out_get_no_better_and_keeps_the_best_weights(tmp_path):
    """Twenty random texts are learnt by heart, which does others no good."""
    stopped, whole, losses = student(), student(), []

    def at_the_end_of_epochs(done, total, what):
        if done % 5 == 0:
            losses.append(held_out_loss(whole))

    train(whole, MANY[:-4], PLAIN, dataclasses.replace(STOPPING, patience=0), tmp_path / "other",
          progress=at_the_end_of_epochs)  # fmt: skip
    found = train(stopped, MANY, PLAIN, STOPPING, tmp_path / "runs")

    best = losses.index(min(losses))
    assert 12 == len(losses)
    assert 5 * (best + 1 + 2) == len(found.losses) < 60
    assert held_out_loss(stopped) == pytest.approx(losses[best], rel=1e-5)


def test_a_run_that_stopped_early_is_read_and_not_trained_again(tmp_path):
    first, second, steps = student(), student(), []
    before = train(first, MANY, PLAIN, STOPPING, tmp_path / "runs")
    after = train(second, MANY, PLAIN, STOPPING, tmp_path / "runs", progress=lambda *step: steps.append(step))

    assert (before, []) == (after, steps)
    torch.testing.assert_close(weights(first), weights(second), rtol=0, atol=0)


def test_texts_held_out_leave_enough_for_a_step():
    settings = dataclasses.replace(STOPPING, accumulation=2)

    with pytest.raises(TrainingError, match="4 x 2 = 8 texts, and there are 8, 4 of them held out"):
        train(student(), IDS, PLAIN, settings, "nowhere")
