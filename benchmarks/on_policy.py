"""The on-policy step beyond generation against the off-policy step on the same tokens, on the embedded default.

    python benchmarks/on_policy.py [--layers 24] [--batch 4] [--new-tokens 64] [--repeats 5] [--json]

One process, real models, prompts of GSM8K's form. Each repeat draws answers once (``generation``), then times, in turn:
``on_policy_beyond_generation``, all that ``DistillTrainer`` does at a step of an on-policy run but the call of
``generate``; and ``off_policy``, the same trainer's step on the answers as data. Medians after a warm-up. Also told:
how many bytes of memory are in use after the step more than before it, so a key-value cache that stays would show.
"""

import argparse
import copy
import gc
import json
import platform
import statistics
import tempfile
import time
from typing import Any

import psutil
import torch

from selkd import DistillTrainer
from selkd.data.documents import Exchange
from selkd.data.encoding import Encoder
from selkd.data.samples import Sample, SampleDataset
from selkd.models.loading import load_model, native_dtype
from selkd.models.pruning import keep_layers
from selkd.models.sources import default_cache_dir, locate
from selkd.models.tokenizers import load_tokenizer
from selkd.recipe.data import RowOptions
from selkd.training import on_policy as rollout
from selkd.training.arguments import DistillArguments
from selkd.training.on_policy import PromptCollator

CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 24), ("batch", 4), ("new-tokens", 64), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    source, dtype = locate("demo", default_cache_dir()), native_dtype(CPU)
    tokenizer, teacher = load_tokenizer(source), load_model(source, dtype, CPU)
    n = teacher.config.num_hidden_layers
    kept = [round(i * (n - 1) / (options.layers - 1)) for i in range(options.layers)]
    student = keep_layers(load_model(source, torch.float32, CPU), kept)
    data = RowOptions(
        prompt_field="q",
        completion_field="a",
        template="Question: {prompt}\nAnswer: {completion}",
        packing=False,
    )
    encode = Encoder(data, tokenizer)
    samples = []
    for i in range(options.batch):
        asked = (
            f"A shop sells {i + 3} boxes of {7 * i + 12} pens each day. " * 4 + "How many pens does it sell in a week?"
        )
        (marked,) = encode(
            Exchange(asked, f"It sells {(i + 3) * (7 * i + 12)} a day. #### {7 * (i + 3) * (7 * i + 12)}")
        )
        samples.append(Sample(*map(torch.tensor, (marked.token_ids, [0])), torch.tensor(marked.is_target)))  # type: ignore[arg-type]

    def trainer(on_policy: dict[str, Any] | None) -> DistillTrainer:
        args = DistillArguments(
            output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=dtype == torch.bfloat16, report_to="none",
            per_device_train_batch_size=options.batch, learning_rate=0.0, data=data, seed=0,
            criterion={"name": "reverse_kl"}, positions={"metric": "student_entropy", "fraction": 0.2},
            on_policy=on_policy,
        )  # fmt: skip
        made = DistillTrainer(
            model=copy.deepcopy(student), teacher=teacher, args=args,
            train_dataset=SampleDataset.from_samples(samples), processing_class=tokenizer,
        )  # fmt: skip
        made.model_wrapped = made.accelerator.prepare(made.model)
        made.create_optimizer()
        made.current_gradient_accumulation_steps = 1
        return made

    on, generate, spent = trainer({"max_new_tokens": options.new_tokens}), rollout.generate, [0.0]

    def timed_generate(*given: Any, **named: Any) -> Any:
        started = time.perf_counter()
        found = generate(*given, **named)
        spent[0] += time.perf_counter() - started
        return found

    rollout.generate = timed_generate  # type: ignore[assignment]
    off = trainer(None)

    def step(of: DistillTrainer, batch: Any) -> float:
        of.state.max_steps = 10
        started = time.perf_counter()
        batches, count = of.get_batch_samples(iter([batch]), 1, CPU)
        of.training_step(of.model_wrapped, batches[0], num_items_in_batch=count)
        of.optimizer.step()
        of.model.zero_grad()
        step.batch = batches[0]  # type: ignore[attr-defined]
        return time.perf_counter() - started

    seconds: dict[str, list[float]] = {"generation": [], "on_policy_beyond_generation": [], "off_policy": []}
    growth, tokens = [], []
    for repeat in range(options.repeats + 1):
        spent[0] = 0.0
        gc.collect()
        before = psutil.Process().memory_info().rss
        whole = step(on, PromptCollator(int(tokenizer.pad_token_id))(samples))
        gc.collect()
        growth.append(psutil.Process().memory_info().rss - before)
        generation, answered = spent[0], step.batch  # type: ignore[attr-defined]
        alone = step(off, answered)
        if repeat:
            tokens.append(int(answered["valid_mask"].sum()))
            for name, value in zip(seconds, (generation, whole - generation, alone), strict=True):
                seconds[name].append(value)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    pairs = zip(seconds["on_policy_beyond_generation"], seconds["off_policy"], strict=True)
    ratios = [ours / theirs for ours, theirs in pairs]
    answer = {
        "device": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "dtype": str(dtype).removeprefix("torch."),
        "shape": vars(options),
        "generated_tokens": tokens,
        "seconds": medians,
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "memory_growth_bytes": growth[1:],
    }
    if options.json:
        print(json.dumps(answer, indent=2))
        return
    for name, value in medians.items():
        print(f"{name:28} {value:6.2f} s")
    low, high = answer["ratio_range"]
    print(f"beyond generation / off-policy: {answer['ratio']:.2f} ({low:.2f} to {high:.2f})")
    print(f"resident memory after each on-policy step, MB more than before it: {[round(g / 1e6) for g in growth[1:]]}")


if __name__ == "__main__":
    main()
