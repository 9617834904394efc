"""The work that `peers.py` compares, as each library does it; one process runs one library on one task.

    python benchmarks/contenders.py LIBRARY TASK FOLDER OPTIONS

FOLDER is shared by all: for the tasks on a model it holds `model` (a checkpoint), `calibration.pt` and `held_out.pt`
(token ids). OPTIONS are JSON. What a library made of the work is left in FOLDER, where `peers.py` judges it; what it
took is printed as one line of JSON. This file runs in every library's own environment: it imports torch alone, the
library late. All draw the inputs of a layer from the same seed.

Clocks: of the Hessian all `add` calls and what is left to do after the last; of rounding a weight everything from the
weight and the Hessian to the codes, scales included, of pruning to the pruned weight, the best of `repeats`; of a model
the library's own entry point, from the opened model and the token ids to the compressed model, once.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BITS, GROUP, DAMP = 4, 128, 0.01
HQQ_GROUP = 64
SPARSITY, PATTERN = 0.5, (2, 4)


def weight_and_inputs(options: dict[str, Any]) -> tuple[Tensor, Callable[[], Iterator[Tensor]]]:
    """W (outputs, inputs), and its inputs (length, inputs) sample by sample: correlated, of uneven size."""
    cols, rows = options["inputs"], options["outputs"]
    generator = torch.Generator().manual_seed(options["seed"])
    weight = torch.randn(rows, cols, generator=generator) * 0.02
    rank = max(8, cols // 8)
    mix = torch.randn(rank, cols, generator=generator) / rank**0.5
    size = torch.exp(0.5 * torch.randn(cols, generator=generator))

    def inputs() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(options["seed"] + 1)
        for _ in range(options["samples"]):
            shared = torch.randn(options["length"], rank, generator=generator) @ mix
            yield (shared + 0.3 * torch.randn(options["length"], cols, generator=generator)) * size

    return weight, inputs


class Clock:
    """Seconds by name, and the peak of resident memory above where the first clocked work began, in MiB."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start: float | None = None

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        """The result of `work`; its time is added to `name`."""
        if self._start is None:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
            self._start = self._peak()
        begin = time.perf_counter()
        result = work()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin
        return result

    def best(self, name: str, repeats: int, prepare: Callable[[], Any], work: Callable[[Any], Any]) -> Any:
        """The result of `work`, given anew what `prepare` makes; the shortest of its times."""
        times = []
        for _ in range(repeats):
            prepared = prepare()
            self.seconds.pop(name, None)
            result = self(name, lambda prepared=prepared: work(prepared))
            times.append(self.seconds[name])
        self.seconds[name] = min(times)
        return result

    @property
    def peak_mib(self) -> float:
        assert self._start is not None
        return self._peak() - self._start

    @staticmethod
    def _peak() -> float:
        try:
            status = Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) / 1024
        except (OSError, IndexError):
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Library:
    """One contender. A task that it does not define, it cannot do."""

    def __init__(self, folder: Path, options: dict[str, Any]):
        self.folder, self.options, self.clock = folder, options, Clock()

    def answer(self, name: str, **tensors: Tensor) -> None:
        """Leave results for `peers.py` to judge."""
        torch.save(tensors, self.folder / f"{name}.{type(self).__name__}.pt")

    def calibration(self) -> Tensor:
        return torch.load(self.folder / "calibration.pt", weights_only=True)

    def model(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder / "model", dtype=self.dtype, trust_remote_code=False)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.options["dtype"])

    @torch.no_grad()
    def answer_model(self, task: str, model: Any) -> None:
        """Leave the logits of held-out ids."""
        held_out = torch.load(self.folder / "held_out.pt", weights_only=True)
        self.answer(task, logits=model(input_ids=held_out).logits.float())

    def linear(self, weight: Tensor) -> torch.nn.Linear:
        linear = torch.nn.Linear(*reversed(weight.shape), bias=False)
        linear.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
        return linear


class ours(Library):
    static = False  # groups' scales from the weights as they are when the group begins

    def layer(self) -> None:
        from compression.calibration.observers import Hessian
        from compression.numeric.grids import AffineGrid
        from compression.numeric.rounding import gptq

        weight, inputs = weight_and_inputs(self.options)
        grid = AffineGrid(bits=BITS, group_size=GROUP, symmetric=True)
        sums = self.clock("hessian", lambda: Hessian(weight.shape[1]))
        for x in inputs():
            self.clock("hessian", lambda x=x: sums.add(x))
        hessian = self.clock("hessian", sums.value)
        rounded = self.clock.best(
            "round", self.options["repeats"], lambda: None,
            lambda _: gptq(weight, hessian, grid, damp=DAMP, params=grid.fit(weight) if self.static else None),
        )  # fmt: skip
        self.answer("layer", hessian=hessian, quantized=rounded.decode(grid))

    def sparsegpt(self) -> None:
        from compression.calibration.observers import Hessian
        from compression.numeric.sparsity import sparsegpt

        weight, inputs = weight_and_inputs(self.options)
        sums = self.clock("hessian", lambda: Hessian(weight.shape[1]))
        for x in inputs():
            self.clock("hessian", lambda x=x: sums.add(x))
        hessian = self.clock("hessian", sums.value)
        free, pattern = (
            self.clock.best(
                clock, self.options["repeats"], lambda: None,
                lambda _, p=p: sparsegpt([weight], hessian, SPARSITY, p, damp=DAMP).weights[0],
            )
            for clock, p in (("prune", None), ("prune 2:4", PATTERN))
        )  # fmt: skip
        self.answer("sparsegpt", free=free, pattern=pattern)

    def hqq(self) -> None:
        from compression.numeric.grids import AffineGrid
        from compression.numeric.half_quadratic import half_quadratic

        weight, _ = weight_and_inputs(self.options)
        grid = AffineGrid(bits=BITS, group_size=HQQ_GROUP, symmetric=False, float_zeros=True)
        rounded = self.clock.best("round", self.options["repeats"], lambda: None,
                                  lambda _: half_quadratic(weight, grid))  # fmt: skip
        self.answer("hqq", quantized=rounded.decode(grid))

    def block(self) -> None:
        self._model(
            "block",
            f"gptq(bits={BITS},group_size={GROUP},symmetric=true,act_order=false,static_groups=false,damp={DAMP}",
        )

    def awq(self) -> None:
        self._model("awq", f"awq(bits={BITS},group_size={GROUP}")

    def _model(self, task: str, recipe: str) -> None:
        import compression

        ids = self.calibration()
        recipe = compression.Recipe.parse(f"{recipe},samples={len(ids)},sequence_length={ids.shape[1]})")
        base = compression.open_base(str(self.folder / "model"))
        result = self.clock("whole", lambda: compression.compress(base, recipe, calibration=ids))
        self.answer_model(task, result.model)


class ours_static(Library):
    """Static groups: scales from the weights before any is rounded, as llmcompressor has them."""

    static, layer = True, ours.layer


class plain(Library):
    """Algorithm 1 of the paper, with no library: blocks of 128 columns, each of which is a group."""

    def layer(self) -> None:
        weight, inputs = weight_and_inputs(self.options)
        hessian = torch.zeros(2 * weight.shape[1:])
        for x in inputs():
            self.clock("hessian", lambda x=x: hessian.addmm_(x.t(), x))
        hessian *= 2 / (self.options["samples"] * self.options["length"])
        quantized = self.clock.best("round", self.options["repeats"], weight.clone, lambda w: self._round(w, hessian))
        self.answer("layer", hessian=hessian, quantized=quantized)

    @staticmethod
    def _round(weight: Tensor, hessian: Tensor) -> Tensor:
        quantized, top = torch.empty_like(weight), 2**BITS - 1
        damped = hessian + DAMP * hessian.diagonal().mean() * torch.eye(len(hessian))
        upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
        for begin in range(0, weight.shape[1], GROUP):
            end, part = begin + GROUP, weight[:, begin : begin + GROUP]
            scale = 2 * part.abs().amax(1) / top
            errors = torch.empty_like(part)
            for j in range(GROUP):
                code = (part[:, j] / scale + 2 ** (BITS - 1)).round().clamp(0, top)
                quantized[:, begin + j] = (code - 2 ** (BITS - 1)) * scale
                errors[:, j] = (part[:, j] - quantized[:, begin + j]) / upper[begin + j, begin + j]
                part[:, j:] -= errors[:, j, None] * upper[begin + j, begin + j : end]
            weight[:, end:] -= errors @ upper[begin:end, end:]
        return quantized


class llmcompressor(Library):
    def layer(self) -> None:
        from compressed_tensors.quantization import preset_name_to_scheme
        from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
        from llmcompressor.modifiers.gptq.helpers import accumulate_hessian, make_empty_hessian
        from llmcompressor.observers import Observer

        weight, inputs = weight_and_inputs(self.options)
        linear, count = self.linear(weight), torch.zeros(())
        settings = preset_name_to_scheme("W4A16", ["Linear"]).weights
        hessian = self.clock("hessian", lambda: make_empty_hessian(linear))
        for x in inputs():
            hessian, count = self.clock("hessian", lambda x=x, h=hessian, n=count: accumulate_hessian(x, linear, h, n))
        hessian = self.clock("hessian", lambda: hessian / count)

        def round_(copies: tuple[Tensor, Tensor]) -> Tensor:  # overwrites both
            observer = Observer.load_from_registry("memoryless_minmax", base_name="weight", args=settings,
                                                   module=linear)  # fmt: skip
            observer(linear.weight)
            found = observer.get_qparams()
            return quantize_weight(
                weights=copies[0][None], hessians=copies[1][None], scale=found["scale"][None],
                zero_point=found["zero_point"][None], global_scale=None, quant_args=settings, blocksize=128,
                percdamp=DAMP,
            )[0][0]  # fmt: skip

        quantized = self.clock.best("round", self.options["repeats"], lambda: (weight.clone(), hessian.clone()), round_)
        self.answer("layer", hessian=hessian, quantized=quantized)

    def sparsegpt(self) -> None:
        from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import (
            accumulate_hessian,
            make_empty_hessian,
            sparsify_weight,
        )

        weight, inputs = weight_and_inputs(self.options)
        linear, count = self.linear(weight), 0
        hessian = self.clock("hessian", lambda: make_empty_hessian(linear))
        for x in inputs():
            hessian, count = self.clock("hessian", lambda x=x, h=hessian, n=count: accumulate_hessian(x, linear, h, n))
        free, pattern = (
            self.clock.best(
                clock, self.options["repeats"], lambda: {linear: hessian.clone()},  # overwrites it
                lambda held, n=n, m=m: sparsify_weight(
                    module=linear, hessians_dict=held, sparsity=SPARSITY, prune_n=n, prune_m=m, block_size=128,
                    dampening_frac=DAMP, preserve_sparsity_mask=False,
                )[1],
            )
            for clock, n, m in (("prune", 0, 0), ("prune 2:4", PATTERN[1] - PATTERN[0], PATTERN[1]))
        )  # fmt: skip
        self.answer("sparsegpt", free=free, pattern=pattern)

    def block(self) -> None:
        from llmcompressor.modifiers.gptq import GPTQModifier

        self._model("block", [GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"],
                                           dampening_frac=DAMP, actorder=None)])  # fmt: skip

    def awq(self) -> None:
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.awq import AWQModifier
        from llmcompressor.pipelines.cache import IntermediatesCache

        IntermediatesCache.pin_memory = lambda *_, **__: None  # it asks for an accelerator, and fails without
        self._model("awq", [AWQModifier(n_grid=20),
                            QuantizationModifier(targets=["Linear"], scheme="W4A16_ASYM", ignore=["lm_head"])],
                    )  # fmt: skip

    def _model(self, task: str, recipe: list[Any]) -> None:
        from datasets import Dataset
        from llmcompressor import oneshot

        ids, model = self.calibration(), self.model()
        rows = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
        self.clock("whole", lambda: oneshot(model=model, dataset=rows, recipe=recipe, max_seq_length=ids.shape[1],
                                            num_calibration_samples=len(ids)))  # fmt: skip
        self.answer_model(task, model)


class gptqmodel(Library):
    def layer(self) -> None:
        from gptqmodel import QuantizeConfig
        from gptqmodel.looper.named_module import NamedModule
        from gptqmodel.quantization.gptq import GPTQ

        weight, inputs = weight_and_inputs(self.options)
        settings = QuantizeConfig(bits=BITS, group_size=GROUP, desc_act=False, act_group_aware=False, sym=True,
                                  damp_percent=DAMP)  # fmt: skip

        def fresh(hessian: Tensor | None = None, count: int = 0) -> Any:
            work = GPTQ(NamedModule(self.linear(weight), name="l", full_name="l", layer_index=0), settings)
            work.quantizer.configure(perchannel=True)
            if hessian is not None:
                device = torch.device("cpu")
                work._device_hessian_partials[device] = hessian.clone()
                work._device_sample_counts[device] = work.nsamples = count
                work._hessian_dirty = True
            return work

        with torch.inference_mode():
            work = fresh()
            for i, x in enumerate(inputs()):
                self.clock("hessian", lambda i=i, x=x: work.add_batch(x[None], None, batch_index=i))
            hessian, count = work._device_hessian_partials[torch.device("cpu")].clone(), work.nsamples
            quantized = self.clock.best("round", self.options["repeats"], lambda: fresh(hessian, count),
                                        lambda work: work.quantize(blocksize=128)[0])  # fmt: skip
        self.answer("layer", hessian=hessian.clone(), quantized=quantized.clone())

    def block(self) -> None:
        self._model("block", desc_act=False, act_group_aware=False, sym=True, damp_percent=DAMP)

    def awq(self) -> None:
        self._model("awq", quant_method="awq", format="gemm", sym=False)

    def _model(self, task: str, **settings: Any) -> None:
        from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

        settings = QuantizeConfig(bits=BITS, group_size=GROUP, **settings)
        model = GPTQModel.load(str(self.folder / "model"), settings, device="cpu", dtype=self.dtype)
        rows = [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]} for ids in self.calibration()]
        backend = BACKEND.AWQ_TORCH if task == "awq" else BACKEND.TORCH
        self.clock("whole", lambda: model.quantize(rows, batch_size=1, backend=backend))
        model.save(str(self.folder / f"{task}.gptqmodel"))
        half = torch.float16 if self.dtype == torch.float32 else self.dtype  # its kernels take no fp32
        self.answer_model(task, GPTQModel.load(str(self.folder / f"{task}.gptqmodel"), device="cpu", dtype=half,
                                               backend=backend).model)  # fmt: skip


class hqq(Library):
    def hqq(self) -> None:
        from hqq.core.quantize import Quantizer

        weight, _ = weight_and_inputs(self.options)
        codes, meta = self.clock.best(
            "round", self.options["repeats"], lambda: None,
            lambda _: Quantizer.quantize(weight, nbits=BITS, group_size=HQQ_GROUP, axis=1, device="cpu",
                                         compute_dtype=torch.float32),
        )  # fmt: skip
        self.answer("hqq", quantized=Quantizer.dequantize(codes, meta | {"compute_dtype": torch.float32}))


LIBRARIES: dict[str, type[Library]] = {c.__name__: c for c in (ours, ours_static, plain, llmcompressor, gptqmodel, hqq)}


def main() -> None:
    name, task, folder, options = sys.argv[1:]
    torch.set_num_threads(json.loads(options)["threads"])
    library = LIBRARIES[name](Path(folder), json.loads(options))
    getattr(library, task)()
    print(json.dumps({"seconds": library.clock.seconds, "peak_mib": library.clock.peak_mib}))


if __name__ == "__main__":
    main()
