"""What a plan says of training, against the training itself."""

import pytest
import torch
from checkpoints import transformers_model

import compression
from bench.session.training_plan import TrainingPlan, plan_training
from compression.checkpoints import base

IDS = torch.randint(48, (8, 10), generator=torch.Generator().manual_seed(0))
PAIRS = [(f"{a} + {b} =", f" {a + b}\n") for a in range(6) for b in range(6)]
KD = "kd(samples=8,sequence_length=10,epochs=3,batch=2,accumulation=2)"
RECOVER = "recover(rank=4,sequence_length=64,epochs=2,batch=4)"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Texts of a student, and of a wider teacher of its tokenizer."""
    found = []
    for name, sizes in (("student", {}), ("teacher", {"hidden_size": 64})):
        folder = tmp_path_factory.mktemp("bases") / name
        transformers_model("LlamaForCausalLM", **{"vocab_size": 258} | sizes).save_pretrained(folder)
        base.byte_tokenizer().save_pretrained(folder)
        found.append(str(folder))
    return found


def planned(recipe, bases):
    return plan_training(compression.plan(bases[0], recipe, calibration=IDS, teacher=bases[1], downstream=PAIRS))


@pytest.mark.parametrize("text", [KD, f"{KD[:-1]},top_k=5)", RECOVER, f"nf4(group_size=32)-{RECOVER}"])
def test_the_tokens_and_the_disk_of_a_plan_are_those_of_the_training(bases, tmp_path, text):
    plan = planned(text, bases)

    result = compression.compress(
        bases[0], text, calibration=IDS, teacher=bases[1], downstream=PAIRS, cache=tmp_path / "cache"
    )
    assert result.cost.trained_tokens == plan.tokens
    kept = sum(path.stat().st_size for path in tmp_path.glob("cache/teachers/**/*.safetensors"))
    assert kept <= plan.disk * 1.2 + 4096 and plan.disk <= kept * 1.2


def test_of_several_trainings_tokens_add_up_and_the_largest_needs_the_memory(bases):
    one, other = planned(KD, bases), planned(RECOVER, bases)
    both = planned(f"{KD}-{RECOVER}", bases)

    assert one.then(other) == both
    assert one.tokens + other.tokens == both.tokens
    assert max(one.memory, other.memory) == both.memory
    assert TrainingPlan() == planned("nf4(group_size=32)", bases)


def test_adapters_need_less_memory_than_all_weights_and_8_bit_moments_less_than_32(bases):
    wide = "sequence_length=10,samples=8,batch=2"
    everything = planned(f"kd({wide})", bases)
    moments = planned(f"kd({wide},optimizer=adamw_8bit)", bases)
    weights = sum(p.numel() for p in compression.open_base(bases[0]).model.parameters())

    assert 6 * weights == everything.memory - moments.memory
    assert planned("recover(rank=1,sequence_length=16,batch=1)", bases).memory < everything.memory
