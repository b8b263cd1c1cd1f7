"""lm-evaluation-harness as a library: its tasks, its prompts, its scores, on a model that is already in memory.

selkd decides three things itself: the batch size (the harness's search relies on an error when memory runs out), the
softmax's precision (the harness would take the model's, and bfloat16 has three digits), and local rows.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from jinja2 import TemplateError
from transformers import PreTrainedModel

from selkd.errors import InputError, RunError
from selkd.evaluation.batch_size import answer_tokens, rows_at_once
from selkd.evaluation.benchmarks import KNOWN, Benchmark
from selkd.evaluation.calibration import choice_confidence
from selkd.evaluation.evaluated_model import EvaluatedModel
from selkd.evaluation.ifeval import prepare_ifeval
from selkd.evaluation.last_word import greedy_confidences
from selkd.evaluation.local_data import local_splits
from selkd.evaluation.results import Measured
from selkd.interrupts import stop_if_asked
from selkd.maths.finite import not_finite
from selkd.models.sources import default_cache_dir
from selkd.recipe.harness_names import has_own_task, is_task_file

_SHOTS_SEED = 1234  # the default of the harness


def load_tasks(
    name: str, data: Sequence[str | Path] | None, shots: int, include_path: Sequence[str] = ()
) -> dict[str, Any]:
    """The harness's tasks, by name, of a benchmark, a task or a group of tasks.

    Args:
        name: a benchmark of ``KNOWN``, a task or group of the harness or of the user, or the path of a task's file.
        data: folders of local files; None: the harness loads the rows from the hub, or as a task of the user says.
        shots: the number of solved examples before each question, where there are training rows to take them from. A
            task of the user has those of its file unless ``shots`` is above 0.
        include_path: folders of the user's own tasks.

    Raises:
        InputError: the name is unknown, local folders are given for a task without local form, or the rows are missing
            or can't be fetched.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings concern its own command line
    disable_progress_bars()
    benchmark = KNOWN.get(name)
    if benchmark is None and data is not None:
        raise InputError(
            f"{name}: has no local form; only {', '.join(KNOWN)} have. Measure it in a call of its own, without data."
        )
    try:
        if "ifeval" in name:
            prepare_ifeval(default_cache_dir())
        tasks = {name: _load(benchmark, data, shots)} if benchmark else _load_by_name(name, shots, include_path)
    except (OSError, LookupError, ImportError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        advice = (
            f"Without a hub, give --data with a folder that holds {benchmark.file}."
            if benchmark
            else "Is there a network?"
        )
        raise InputError(f"{name}: can't load its rows ({type(error).__name__}: {reason:.200}). {advice}") from error
    for task in tasks.values():
        task.set_fewshot_seed(seed=_SHOTS_SEED)
    return tasks


def _load(benchmark: Benchmark, data: Sequence[str | Path] | None, shots: int) -> Any:
    from lm_eval import tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(tasks.__file__).parent / benchmark.yaml, resolve_func=True)
    config = {key: value for key, value in config.items() if key != "tag"} | dict(benchmark.overrides)
    config["num_fewshot"] = shots if benchmark.few_shot else 0
    if data is not None:
        splits = local_splits(benchmark, data, config["num_fewshot"])
        config["custom_dataset"] = lambda **_: splits
    return ConfigurableTask(config=config)


def _load_by_name(name: str, shots: int, include_path: Sequence[str]) -> dict[str, Any]:
    is_own = is_task_file(name) or has_own_task(include_path, name)
    if not is_own:
        tasks: dict[str, Any] = _task_manager(()).load([name])["tasks"]
    else:
        tasks = _own_tasks(name, include_path)
    for task in tasks.values():
        if getattr(task, "UNSAFE_CODE", False):
            raise InputError(f"{name}: the task runs the model's code on this machine; selkd does not.")
        if shots if is_own else not shots or task.get_config("num_fewshot") != 0:
            task.set_config("num_fewshot", shots)
    return tasks


def _own_tasks(name: str, include_path: Sequence[str]) -> dict[str, Any]:
    """The user's tasks of this name or file. The harness's own, slow to index, are so only if a group has some."""
    folders = tuple(str(Path(folder).expanduser().absolute()) for folder in include_path)
    if is_task_file(name):
        name = str(Path(name).expanduser().absolute())
        folders = (*folders, str(Path(name).parent))
    try:
        tasks: dict[str, Any] = _task_manager(folders, with_harness=False).load([name])["tasks"]
        is_whole = bool(tasks) and not any("::" in task for task in tasks)  # so it names what it does not find
    except TemplateError as error:
        raise _no_task(name, error) from error
    except (KeyError, ValueError, TypeError):
        is_whole = False
    if is_whole:
        return tasks
    try:
        tasks = _task_manager(folders).load([name])["tasks"]
    # What a task's file lacks shows in all of these ways.
    except (KeyError, ValueError, TypeError, AttributeError, TemplateError) as error:
        raise _no_task(name, error) from error
    return tasks


def _no_task(name: str, error: Exception) -> InputError:
    return InputError(f"{name}: the harness can't make a task of it ({type(error).__name__}: {error}).")


def build_requests(name: str, task: Any, rows: Sequence[int]) -> None:
    """Have the harness make the task's requests of these rows, by the task's templates.

    Raises:
        InputError: a template, or a function of the task, can't be applied to a row.
    """
    try:
        task.build_all_requests(samples=rows)
    except (TemplateError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{name}: the harness can't make a request of a row ({type(error).__name__}: {error}). Compare "
            "doc_to_text, doc_to_target and doc_to_choice of the task's file with the names in its rows."
        ) from error


@cache
def _task_manager(include_path: tuple[str, ...], with_harness: bool = True) -> Any:
    """The harness's index of tasks; with the harness's own, thousands of files are read, for about ten seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(include_path) or None, include_defaults=with_harness)


def require_answerable(tasks: Mapping[str, Any], model: EvaluatedModel, chat_template: bool) -> None:
    """Check, without loading the weights, that the model can be measured on the tasks.

    Raises:
        InputError: answers may take more positions than the model has, the tokenizer has no chat template, or a task
            can't use one.
    """
    for name, task in tasks.items():
        if chat_template and not model.tokenizer.chat_template:
            raise InputError("chat template: the tokenizer has none; measure without it.")
        if chat_template and task.OUTPUT_TYPE == "loglikelihood_rolling":
            raise InputError(
                f"chat template: {name} measures text as it stands, without a prompt. Measure it in a call of its own, "
                "without a chat template."
            )
        is_written, needed = task.OUTPUT_TYPE == "generate_until", answer_tokens(task)
        if is_written and model.positions is not None and needed >= model.positions:
            raise InputError(
                f"{name}: answers may be {needed} tokens long, and the model has {model.positions} positions for "
                "prompt and answer. Leave the task out, or take a model with more positions."
            )


def spread_rows(n_rows: int, limit: int | None) -> Sequence[int]:
    """``limit`` row numbers spread evenly over ``n_rows``; all of them if there are no more.

    Benchmarks are sorted, so the first rows would not represent them: those of HellaSwag are all of one kind. All rows
    are a range, in which the harness finds a row faster than in a list.
    """
    if limit is None or limit >= n_rows:
        return range(n_rows)
    return [index * n_rows // limit for index in range(limit)]


def run_task(
    name: str,
    task: Any,
    rows: Sequence[int],
    model: EvaluatedModel,
    chat_template: bool = False,
    batch_size: int | None = None,
) -> Measured:
    """Measure ``model`` on some rows of a task.

    Args:
        task: a task whose requests for these rows are built.
        rows: ascending row numbers, as ``spread_rows`` returns them.
        chat_template: whether each prompt is put into the tokenizer's chat template.
        batch_size: prompts at once, halved whenever memory runs out; None: chosen from the free memory.

    Returns:
        The result. Its ``details`` are ``prompts_cut``, the number of prompts that were cut from the left to fit, and
        ``model_tokens``, the most tokens of prompt and answer that the model takes.

    Raises:
        RunError: a single example does not fit in memory, or the model's answers or their scores are not finite.
    """
    from lm_eval.evaluator import evaluate

    size = batch_size or rows_at_once(task, model)
    while True:
        lm = _language_model(model, size)
        try:
            with _numbers_required(name, model.model):
                results = evaluate(
                    lm=lm,
                    task_dict={"tasks": {name: task}},
                    samples={name: rows},
                    bootstrap_iters=0,
                    log_samples=True,
                    apply_chat_template=chat_template,
                    fewshot_as_multiturn=chat_template,
                )
                measured = _read_results(name, task, results, _cut_rows(task, rows, lm), lm.max_length)
                if name == "lambada":
                    measured.kinds["ece"] = "ece"
                    confidences = greedy_confidences(model, _last_words(task, lm), size)
                    for example, (confidence, is_right) in zip(measured.examples, confidences, strict=True):
                        example["measures"]["ece"] = [confidence, float(is_right)]
            _require_finite(name, measured)
            return measured
        except OverflowError:  # of an exponential that the harness takes, such as a perplexity
            raise not_finite(f"{name}: one of its figures", math.inf) from None
        except torch.OutOfMemoryError:
            if size == 1:
                raise RunError(f"{name}: one example at a time is too much for this device's memory.") from None
            size = size // 2
            torch.cuda.empty_cache()


def _language_model(model: EvaluatedModel, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=model.model,
        tokenizer=model.tokenizer,
        backend="causal",
        batch_size=batch_size,
        softmax_dtype=torch.float32,
        mixed_precision_dtype=None if model.model.dtype == model.dtype else model.dtype,
        trust_remote_code=False,
    )


@contextmanager
def _numbers_required(name: str, model: PreTrainedModel) -> Iterator[None]:
    """Within the block, NaN logits raise RunError; neither a choice nor a written answer would show them. Before each
    batch's scores are used it is looked whether the process was asked to end.

    The last position is checked because it is never padding on the left.
    """

    def check(_module: Any, _inputs: Any, output: Any) -> None:
        stop_if_asked()
        if output.logits[:, -1].isnan().any():
            raise not_finite(f"{name}: the model's logits", math.nan)

    handle = model.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()


def _require_finite(name: str, measured: Measured) -> None:
    """Raises RunError if a log-likelihood, an example's measure or a figure is not finite."""
    for example in measured.examples:
        answers = [answer[0] if isinstance(answer, tuple) else answer for answer in example["responses"]]
        numbers = [number for pair in example["measures"].values() for number in pair]
        for value in (*answers, *numbers):
            if isinstance(value, float) and not math.isfinite(value):
                raise not_finite(f"{name}, row {example['row']}", value)
    for metric, figure in measured.figures.items():
        if not math.isfinite(figure):
            raise not_finite(f"{name}, {metric}", figure)


def _cut_rows(task: Any, rows: Sequence[int], lm: Any) -> set[int]:
    """The rows whose prompt, together with its answer or the room for one, the harness cuts from the left to fit."""
    from lm_eval.models.huggingface import normalize_gen_kwargs

    cut_rows = set()
    for instance in task.instances:
        if instance.request_type == "loglikelihood":
            prompt, answer = instance.args
            needed = len(lm.tok_encode(prompt + answer)) - 1  # the last token is predicted, not read
        elif instance.request_type == "generate_until":
            prompt, settings = instance.args
            needed = len(lm.tok_encode(prompt)) + normalize_gen_kwargs(settings, lm.max_gen_toks)["max_gen_toks"]
        else:
            continue  # a rolling log-likelihood reads the entire text, window by window
        if needed > lm.max_length:
            cut_rows.add(rows[instance.doc_id])  # doc_id counts the measured rows
    return cut_rows


def _read_results(name: str, task: Any, results: Mapping[str, Any], cut_rows: set[int], max_length: int) -> Measured:
    """The harness's results as ``Measured``, with the ECE of multiple choices added."""
    examples: dict[int, dict[str, Any]] = {}
    kinds: dict[str, str] = {}
    samples, aggregations = results["samples"][name], task.aggregation()
    several = len({sample["filter"] for sample in samples}) > 1
    for sample in samples:
        row, target = sample["doc_id"], sample["target"]
        example = {
            "row": row,
            "prompt": sample["arguments"][0][0],
            "target": target if isinstance(target, str | int | float | list) else str(target),
            "responses": [response[0] for response in sample["resps"]],
            "measures": {},
            "cut": row in cut_rows,
        }
        measures = examples.setdefault(row, example)["measures"]
        for metric in sample["metrics"]:
            numbers = _numbers(aggregations.get(metric), sample[metric])
            if numbers is not None:
                label = f"{metric},{sample['filter']}" if several else metric
                kinds[label], measures[label] = numbers
        is_choice = task.OUTPUT_TYPE == "multiple_choice" and "acc_mutual_info" not in sample["metrics"]
        if is_choice and "acc" in sample["metrics"]:
            confidence = choice_confidence([answer[0] for answer in sample["filtered_resps"]])
            kinds["ece"], measures["ece"] = "ece", [confidence, float(sample["acc"])]
    figures, better = {}, {}
    for key, value in results["results"][name].items():
        metric, _, filtered = key.partition(",")
        if filtered and "_stderr" not in metric and isinstance(value, int | float):
            label = key if several else metric
            figures[label] = float(value)
            better[label] = bool(task.higher_is_better().get(metric, True))
    details = {"prompts_cut": len(cut_rows), "model_tokens": max_length}
    return Measured([examples[row] for row in sorted(examples)], kinds, figures, better, details)


def _last_words(task: Any, lm: Any) -> list[tuple[list[int], list[int]]]:
    """The tokens of context and last word of LAMBADA's examples, in the order of rows, as the harness scores them."""
    pairs = []
    for instance in sorted(task.instances, key=lambda instance: instance.doc_id):
        context, word = lm._encode_pair(*instance.args)
        pairs.append((context[-(lm.max_length + 1 - len(word)) :], word))  # cut from the left, as the harness does
    return pairs


def _numbers(aggregation: Any, value: Any) -> tuple[str, list[float]] | None:
    """The kind and the two numbers of ``ExampleMeasures`` for a value that the harness aggregates in this way.

    None if the aggregation can't be written as a ratio of sums.
    """
    match getattr(aggregation, "__name__", ""):
        case "mean" if isinstance(value, bool | int | float):
            return "ratio", [float(value), 1.0]
        case "perplexity":
            return "exp_ratio", [-float(value), 1.0]
        case "weighted_perplexity":
            return "exp_ratio", [-float(value[0]), float(value[1])]
        case "bits_per_byte":
            return "ratio", [-float(value[0]) / math.log(2), float(value[1])]
        case "agg_inst_level_acc":
            return "ratio", [float(sum(value)), float(len(value))]
    return None
