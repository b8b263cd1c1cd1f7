"""Bad input of every kind that was tried: what is given, and what the refusal says.

``{toy}`` is a folder with a toy teacher, text and recipe, ``{here}`` the case's own folder.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Prepare = Callable[[Path, Path], None]


@dataclass(frozen=True)
class Case:
    """A command that is refused.

    Attributes:
        message: a regular expression of the refusal, white space as one blank.
        files: what lies in the case's folder.
        prepare: makes more of it, from that folder and the toy's.
        needs_models: whether models or data decide, so that torch may be imported.
    """

    name: str
    arguments: tuple[str, ...]
    message: str
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    prepare: Prepare | None = None
    needs_models: bool = False


RUN = ("--out", "{here}/run")
TOY = "{toy}/recipe.yaml"
LONG = "x" * 300


# ----- Files that are to be a recipe.

BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
)
YAML: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "a recipe is a mapping of keys to values, but this is NoneType"),
    "only a comment": ("# nothing", "a recipe is a mapping"),
    "a list": ("- teacher", "a recipe is a mapping of keys to values, but this is list"),
    "a text": ("teacher", "a recipe is a mapping of keys to values, but this is str"),
    "a number": ("7", "a recipe is a mapping of keys to values, but this is int"),
    "two documents": ("seed: 1\n---\nseed: 2", "line 2.*another document"),
    "open bracket": ("teacher: [1, 2", "line 1.*expected"),
    "open quote": ("teacher: 'demo", "line 1.*quoted scalar"),
    "open brace": ("teacher: {model: demo", "line 1.*expected"),
    "tab for a blank": ("teacher:\n\tmodel: demo", "line 2.*cannot start any token"),
    "wrong indentation": ("teacher:\n  model: demo\n dtype: auto", "line 3"),
    "colon in a value": ("teacher: model: demo", "line 1.*mapping values are not allowed"),
    "key twice": ("seed: 1\nseed: 2", "line 2.*the key 'seed' stands twice"),
    "inner key twice": ("data: {path: demo, path: x}", "line 1.*the key 'path' stands twice"),
    "list as key": ("? [a]\n: 1", "line 1.*a key is a text, but this is a list"),
    "mapping as key": ("{{a: 1}: 2}", "line 1.*a key is a text, but this is a mapping"),
    "flow list as key": ("seed: 1\n[a, b]: 2", "line 2.*a key is a text"),
    "number as key": ("seed: 1\n3: x", "line 2.*a key is a text, but this is '3'"),
    "null as key": ("~: x", "line 1.*a key is a text"),
    "truth as key": ("true: x", "line 1.*a key is a text, but this is 'true'"),
    "not-a-number as key": (".nan: x", "line 1.*a key is a text"),
    "list in itself": ("teacher: &t [*t]", "an alias stands for what it is itself a part of"),
    "mapping in itself": ("teacher: &t {model: *t}", "an alias stands for what it is itself a part of"),
    "key in itself": ("&t ? *t : x", "line 1"),
    "unknown alias": ("teacher: *nothing", "line 1.*undefined alias 'nothing'"),
    "aliases that expand to billions": (BOMB, "line 6.*with its aliases this is more than 100,000 values"),
    "aliases that nest": (
        "a0: &a0 [x]\n" + "\n".join(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 60)), "deeper than 32 levels"
    ),
    "deep list": ("a: " + "[" * 5000, "line 1.*nested deeper than 32 levels"),
    "deep mapping": ("a: " + "{a: " * 5000, "line 1.*nested deeper than 32 levels"),
    "deep block": ("\n".join(" " * i + f"k{i}:" for i in range(300)), "line 32.*nested deeper than 32 levels"),
    "deep dashes": ("- " * 5000, "nested deeper than 32 levels"),
    "integer of 5,000 digits": ("seed: " + "9" * 5000, "line 1.*can't be read as int"),
    "integer of 6,000 hexadecimal digits": ("seed: 0x" + "f" * 6000, "line 1.*has more than 64 bits"),
    "integer of 30 digits": ("seed: " + "9" * 30, "line 1.*has more than 64 bits"),
    "tagged integer": ("seed: !!int abc", "line 1, column 7: 'abc' can't be read as int"),
    "tagged empty integer": ("seed: !!int ''", "line 1.*can't be read as int"),
    "tagged float": ("seed: !!float abc", "line 1.*'abc' can't be read as float"),
    "tagged truth": ("seed: !!bool maybe", "line 1.*'maybe' can't be read as bool"),
    "tagged date": ("seed: !!timestamp 2026-99-99", "line 1.*the tag 'timestamp' is not read"),
    "tagged bytes": ("name: !!binary aGVsbG8=", "line 1.*the tag 'binary' is not read"),
    "tagged set": ("name: !!set {a}", "line 1.*the tag 'set' is not read"),
    "tagged pairs": ("name: !!omap [a: 1]", "line 1.*the tag 'omap' is not read"),
    "tagged Python object": ("!!python/object/apply:os.system [touch x]", "line 1.*the tag 'python/object/apply:os.system'"),
    "tagged Python module": ("name: !!python/module:antigravity ''", "line 1.*the tag 'python/module:antigravity'"),
    "tag of its own": ("name: !recipe x", "line 1.*the tag '!recipe' is not read"),
    "list tagged as a mapping": ("data: !!map [1]", "line 1.*expected a mapping node"),
    "merge key": ("a: &a {seed: 1}\n<<: *a", "<<: unknown key"),
    "version of YAML": ("%YAML 9.9\n---\nseed: 1", "line 1.*incompatible YAML document"),
    "unknown directive": ("%TAG ! tag:x,2000:\n%TAG ! tag:y,2000:\n---\nseed: 1", "line 2.*duplicate tag handle"),
    "UTF-16": ("seed: 1".encode("utf-16"), "not a text file; a recipe is YAML in UTF-8"),
    "UTF-16 without mark": ("seed: 1".encode("utf-16-le"), "line 1.*the character #x0000 is not allowed"),
    "UTF-32": ("seed: 1".encode("utf-32"), "not a text file"),
    "latin-1": ("name: café".encode("latin-1"), "not a text file"),
    "binary": (bytes(range(256)) * 8, "not a text file|is not allowed"),
    "compressed": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03", "not a text file"),
    "NUL": ("seed: 1\nname: a\0b", "line 2: the character #x0000 is not allowed"),
    "escape character": ("name: \x1b[31m", "line 1: the character #x001b is not allowed"),
    "line of 10 MB": ("name: " + "x" * 10_000_000, "at most 262,144 are read"),
    "10 MB of lines": ("k: x\n" * 2_000_000, "at most 262,144 are read"),
    "10 MB of brackets": ("[" * 10_000_000, "at most 262,144 are read"),
    "page of the web": ("<!DOCTYPE html><html><body>404</body></html>", "a recipe is a mapping|not readable as YAML"),
    "Python": ("import os\nos.system('x')", "a recipe is a mapping|not readable as YAML"),
    "nothing but unknown keys": ("foo: 1\nbar: 2", "foo: unknown key.*"),
    "key of 5,000 letters": ("k" * 5000 + ": 1", "line 1.*|unknown key"),
    "quoted key of 900 letters": ('"' + "k" * 900 + '": 1', r"characters\): unknown key"),
}  # fmt: skip


# ----- Values of a recipe, by --set.

VALUES: dict[str, str] = {
    "seed=-1": "seed: input should be greater than or equal to 0",
    "seed=1e99": "seed: ",
    "seed=2026-99-99": "seed: input should be a valid integer.*'2026-99-99'",
    "seed=2026-11-29": "seed: input should be a valid integer",
    "seed=1:30": "seed: input should be a valid integer.*'1:30'",
    "seed=.nan": "seed: ",
    "seed=1.5": "seed: input should be a valid integer",
    "seed=4294967296": "seed: input should be less than 4294967296",
    "seed=[1]": "seed: input should be a valid integer",
    "seed=null": "seed: input should be a valid integer",
    "name=../evil": "name: string should match pattern",
    "name=/etc": "name: string should match pattern",
    "name=''": "name: expected a path, but it is empty",
    "name=7": "name: input should be a valid string",
    f"name={LONG}": "name: .*too long",
    "teacher=demo": "teacher: input should be a valid dictionary",
    "teacher.model=''": "teacher.model: expected a path, but it is empty",
    f"teacher.model={LONG}": "teacher.model: .*too long for a path",
    'teacher.model="a\\0b"': "teacher.model: .*NUL",
    "teacher.dtype=int8": "teacher.dtype: 'int8' is not known. Allowed: auto, float32",
    "teacher.device=tpu": "teacher.device: expected cpu, cuda",
    "teacher.device=cuda:-1": "teacher.device: expected cpu, cuda",
    "teacher.quantization=4bit": "teacher.quantization: '4bit' is not known",
    "teacher.server=ftp://host/v1": "teacher.server: expected an address such as http://host:8000/v1",
    "teacher.server=http://:8000": "teacher.server: expected an address such as",
    "teacher.server=https://me:word@host/v1": "teacher.server: expected an address without user, password",
    "teacher.server=http://host/v1": "teacher.dtype: teacher.server names a teacher that is not loaded here",
    "teacher.api_key_env=KEY": "teacher.api_key_env: an option of teacher.server",
    "teacher.requests.parallel=0": "teacher.requests.parallel: .*greater than or equal to 1",
    "teacher.imported=maybe": "teacher.imported: input should be a valid boolean",
    "teacher.revision=main": "teacher.revision: unknown key",
    "student.prune_from_teacher.layers=0": "student.prune_from_teacher.layers: input should be greater",
    "student.prune_from_teacher.layers=1e15": "student.prune_from_teacher.layers: input should be less",
    "student.prune_from_teacher.layers=2.5": "student.prune_from_teacher.layers: input should be a valid integer",
    "student.model=demo": "give exactly one of student.model and student.prune_from_teacher",
    "student={}": "give exactly one of student.model",
    "student.lora.rank=0": "student.lora.rank: input should be greater",
    "student.lora.rank=1e12": "student.lora.rank: input should be less",
    "student.lora.alpha=.inf": "student.lora.alpha: input should be",
    "student.lora.alpha=1e308": "student.lora.alpha: input should be less",
    "student.lora.dropout=1": "student.lora.dropout: input should be less than 1",
    "student.lora.target_modules=[]": "student.lora.target_modules: none",
    "student.lora.target_modules=[lm_head]": "student.lora.target_modules: lm_head is the head",
    "data.path=''": "data.path: expected a path, but it is empty",
    f"data.path={LONG}.txt": "data.path: .*too long for a path",
    "data.path=[a, b]": "data.path: input should be a valid string",
    "data.max_length=1": "data.max_length: input should be greater",
    "data.max_length=1e15": "data.max_length: input should be less",
    "data.max_length=-5": "data.max_length: input should be greater",
    "data.max_length=.inf": "data.max_length: ",
    "data.tokens=1": "data.tokens: ",
    "data.tokens=1e30": "data.tokens: ",
    "data.tokens=-1e9": "data.tokens: ",
    "data.held_out_fraction=.nan": "data.held_out_fraction: ",
    "data.held_out_fraction=1": "data.held_out_fraction: input should be less than 1",
    "data.held_out_tokens=4": "data.held_out_tokens: 4 tokens are fewer",
    "data.template='{prompt}'": "data.template: without effect on texts",
    "data={path: x.jsonl, prompt_field: q, completion_field: a, template: '{completion}{prompt}'}": "data.template: expected",
    "data={path: x.jsonl, completion_field: a}": "data.completion_field: a completion follows a prompt",
    "data={path: x.jsonl, text_field: a, prompt_field: b}": "data.prompt_field: a row has one shape",
    "data.packing=perhaps": "data.packing: input should be a valid boolean",
    "criterion.name=klx": "criterion.name: 'klx' is not known",
    "criterion.temperature=0": "criterion.temperature: ",
    "criterion.temperature=-1": "criterion.temperature: ",
    "criterion.temperature=.nan": "criterion.temperature: ",
    "criterion.temperature=1e308": "criterion.temperature: input should be less than or equal to 1000000",
    "criterion.temperature=1e-300": "criterion.temperature: input should be greater",
    "criterion.kd_weight=1.5": "criterion.kd_weight: ",
    "criterion.kd_weight=.nan": "criterion.kd_weight: ",
    "criterion={name: jsd, beta: 1}": "criterion.beta: jsd mixes",
    "criterion={name: dkd, alpha: 1e308}": "criterion.alpha: input should be less",
    "positions.fraction=0": "positions.fraction: input should be greater than 0",
    "positions.fraction=.nan": "positions.fraction: ",
    "positions.fraction=2": "positions.fraction: input should be less",
    "positions.fraction=true": "positions.fraction: expected a number, but got true",
    "positions.fraction={from: 1, to: 0.2, over: 2}": "positions.fraction.over: input should be less",
    "positions.fraction=[1, 2]": "positions.fraction: input should be a valid number",
    "positions.metric=margin": "positions.metric: 'margin' is not known",
    "positions.metric=nothing.here:x": "positions.metric: 'nothing.here:x': nothing.here can't be imported",
    "positions.metric=os:nothing": "positions.metric: 'os:nothing': os has no function 'nothing'",
    "positions.metric=reverse_kl": "positions.metric: reverse_kl needs the teacher's full distribution",
    "positions={policy: gls, fraction: 0.2, queue_size: 1e15}": "positions.queue_size: input should be less",
    "positions={policy: pos_rs, fraction: 0.2, smoothing: .nan}": "positions.smoothing: input should be",
    "positions={policy: curriculum, fraction: 0.2, curriculum_steps: 1e15}": "curriculum_steps: expected a whole number",
    "positions.queue_size=100": "positions.queue_size: an option of gls",
    "classes.draws=0": "classes.draws: input should be greater",
    "classes.draws=1e9": "classes.draws: input should be less",
    "classes.sampler=all": "classes.draws: .* have no effect beside sampler: all",
    "classes.sampler=rsk": "classes.sampler: 'rsk' is not known",
    "samples.fraction=0": "samples.fraction: input should be greater",
    "samples.metric=entropy": "samples.metric: 'entropy' is not known",
    "samples.path=''": "samples.path: expected a path, but it is empty",
    "samples.frequent_classes=1e15": "samples.frequent_classes: ",
    "cache.path=''": "cache.path: expected a path, but it is empty",
    f"cache.path={LONG}": "cache.path: .*too long for a path",
    "cache.path=7": "cache.path: input should be a valid string",
    "cache.paht=x": r"cache.paht: unknown key. Allowed here: path, scalars. Did you mean 'path'\?",
    "cache=yes": "cache: input should be a valid dictionary",
    "on_policy={max_new_tokens: 1e15}": "on_policy.max_new_tokens: input should be less",
    "on_policy={temperature: 1e308}": "on_policy.temperature: input should be less",
    "on_policy={top_p: 0}": "on_policy.top_p: input should be greater",
    "evaluation.every_steps=0": "evaluation.every_steps: input should be greater",
    "evaluation.suite=[paper, fidelity, 3]": "evaluation.suite.2: input should be a valid string",
    "evaluation.keep_best=loss": "evaluation.keep_best: 'loss' is not known",
    "evaluation.limit=5": "evaluation.limit: only benchmarks have limit",
    "evaluation={suite: [paper], limit: 1e12}": "evaluation.limit: input should be less",
    "hub.repo=nobody": "hub.repo: string should match pattern",
    "hub.repo=../../x": "hub.repo: string should match pattern",
    "training=5": "training: expected keys of transformers.TrainingArguments, but got 5",
    "training.learning_rat=1": r"training.learning_rat: unknown key.*Did you mean 'learning_rate'\?",
    "training.learning_rate=fast": "training.learning_rate: input should be a valid number",
    "training.learning_rate=.nan": "training.learning_rate: expected a finite number from 0",
    "training.learning_rate=-1": "training.learning_rate: expected a finite number from 0",
    "training.max_steps=1e15": "training.max_steps: expected at least 1, at most 2,147,483,647",
    "training.max_steps=-4": "training.max_steps: expected at least 1",
    "training.max_steps=2.5": "training.max_steps: input should be a valid integer",
    "training.num_train_epochs=.inf": "training.num_train_epochs: expected above 0",
    "training.num_train_epochs=1e300": "training.num_train_epochs: expected above 0",
    "training.per_device_train_batch_size=0": "training.per_device_train_batch_size: expected at least 1",
    "training.per_device_train_batch_size=1e9": "training.per_device_train_batch_size: .*data.max_length",
    "training.per_device_train_batch_size=1e15": "training.per_device_train_batch_size: expected at least 1, at most",
    "training.gradient_accumulation_steps=1e12": "training.gradient_accumulation_steps: expected at least 1, at most",
    "training.adam_epsilon=.nan": "training.adam_epsilon: expected a finite number from 0",
    "training.adam_epsilon=-1": "training.adam_epsilon: expected a finite number from 0",
    "training.adam_beta1=5": "training.adam_beta1: expected a number from 0 and below 1",
    "training.adam_beta2=.nan": "training.adam_beta2: expected a number from 0 and below 1",
    "training.weight_decay=.nan": "training.weight_decay: expected a finite number from 0",
    "training.weight_decay=-0.1": "training.weight_decay: expected a finite number from 0",
    "training.max_grad_norm=.nan": "training.max_grad_norm: expected a number from 0",
    "training.max_grad_norm=-1": "training.max_grad_norm: expected a number from 0",
    "training.save_total_limit=-4": "training.save_total_limit: expected at least 1",
    "training.save_total_limit=0": "training.save_total_limit: expected at least 1",
    "training.warmup_steps=2.7": "training.warmup_steps: expected a whole number of optimiser steps",
    "training.warmup_steps=-1": "training.warmup_steps: expected a whole number of optimiser steps",
    "training.warmup_steps=.inf": "training.warmup_steps: expected a whole number of optimiser steps",
    "training.logging_steps=1.5": "training.logging_steps: expected a whole number of optimiser steps",
    "training.logging_steps=0": "training.logging_steps: expected a whole number of optimiser steps",
    "training.save_steps=.nan": "training.save_steps: expected a whole number of optimiser steps",
    "training.save_strategy=best": "training.save_strategy: expected no, steps or epoch",
    "training.save_strategy=sometimes": "training.save_strategy: 'sometimes' is not known. Allowed: no, steps, epoch",
    "training.logging_strategy=often": "training.logging_strategy: 'often' is not known",
    "training.lr_scheduler_type=linea": r"training.lr_scheduler_type: 'linea' is not known.*Did you mean 'linear'\?",
    "training={lr_scheduler_type: constant, warmup_steps: 3}": "training.warmup_steps: the schedule constant has none",
    "training={lr_scheduler_type: constant, lr_scheduler_kwargs: {a: 1}}": "training.lr_scheduler_kwargs: the schedule",
    "training.optim=adam": "training.optim: 'adam' is not known",
    "training.fp16=true": "training.fp16: not set here",
    "training.seed=1": "training.seed: not set here; set the recipe's seed",
    "training.output_dir=elsewhere": "training.output_dir: not set here; give the command's --out",
    "training.local_rank=3": "training.local_rank: not set here",
    "training.neftune_noise_alpha=5": "training.neftune_noise_alpha: not set here; its noise would depend",
    "training.label_smoothing_factor=0.1": "training.label_smoothing_factor: not set here",
    "training.deepspeed=x.json": "training.deepspeed: not set here",
    "training.accelerator_config={split_batches: true}": "training.accelerator_config.split_batches: True can't be honoured",
    "training.accelerator_config={dispatch_batches: true}": "training.accelerator_config.dispatch_batches: True can't",
    "training.accelerator_config={even_batches: false}": "training.accelerator_config.even_batches: False can't",
    "training.accelerator_config={x: 1}": "training.accelerator_config.x: unknown key",
    "training.accelerator_config=x.json": "training.accelerator_config: expected a mapping",
    "training.gradient_checkpointing_kwargs={x: 1}": "training.gradient_checkpointing_kwargs.x: unknown key",
    "training.gradient_checkpointing_kwargs={use_reentrant: false}": "training.gradient_checkpointing_kwargs: without effect",
    "training.activation_checkpointing_kwargs={every: 2}": "training.activation_checkpointing_kwargs.every: unknown key",
    "training={fsdp: full_shard, fsdp_config: {shards: 2}}": "training.fsdp_config.shards: unknown key",
    "training.fsdp_config={version: 2}": "training.fsdp_config: without effect",
    "training.lr_scheduler_kwargs=5": "training.lr_scheduler_kwargs: ",
    "training.dataloader_num_workers=-1": "training.dataloader_num_workers: expected at least 0",
    "training.dataloader_num_workers=1e15": "training.dataloader_num_workers: expected at least 0",
    "training.dataloader_prefetch_factor=4": "training.dataloader_prefetch_factor: only processes of the data loader",
    "training={dataloader_num_workers: 1, dataloader_multiprocessing_context: threads}": "multiprocessing_context: expected fork",
    "training.ddp_timeout=1e15": "training.ddp_timeout: expected at least 1, at most",
    "training.torch_empty_cache_steps=0": "training.torch_empty_cache_steps: expected at least 1",
    "training.log_level=loud": "training.log_level: expected passive",
    "training.include_num_input_tokens_seen=non_padding": "training.include_num_input_tokens_seen: expected no, or all",
    "training.bf16=perhaps": "training.bf16: input should be a valid boolean",
    "training.report_to={a: 1}": "training.report_to: ",
    "steps=100": "steps: unknown key. Allowed here: ",
    "recipe.seed=1": "recipe: unknown key",
    "x": "--set x: expected key.path=value",
    "=3": "--set =3: expected key.path=value",
    "a..b=1": "--set a..b=1: expected key.path=value",
    "seed.x=1": "--set seed.x=1: seed is 3, which has no keys",
    "seed=[1": "--set seed=.*line 1",
    "seed=!!int abc": "--set seed.*'abc' can't be read as int",
    "seed=&a [*a]": "--set seed.*an alias stands for",
    "seed=" + "[" * 3000: "--set seed.*nested deeper than 32 levels",
    "seed=" + "9" * 5000: "--set seed.*can't be read as int",
}  # fmt: skip


# ----- Studies.

STUDIES: dict[str, tuple[str | bytes, str]] = {
    "no base": ("grid: {seed: [1]}", "base: required, but not given"),
    "unknown key": ("base: demo\ngird: {}", r"gird: unknown key.*Did you mean 'grid'\?"),
    "unknown base": ("base: dmo", "dmo: neither a named recipe nor a file"),
    "long base": (f"base: {LONG}", "too long for a path"),
    "base of another kind": ("base: 7", "base"),
    "empty grid": ("base: demo\ngrid: {positions.fraction: []}", "grid.positions.fraction: .*at least 1 item"),
    "value twice": ("base: demo\ngrid: {positions.fraction: [0.1, 0.1]}", "grid.positions.fraction: .*holds a value twice"),
    "seed in the grid": ("base: demo\ngrid: {seed: [1, 2]}", "grid.seed: not set here; give seeds"),
    "no seeds": ("base: demo\nseeds: []", "seeds: .*at least 1 item"),
    "negative seed": ("base: demo\nseeds: [-1]", "seeds.0: input should be greater"),
    "seed twice": ("base: demo\nseeds: [1, 1]", "seeds: .*holds a seed twice"),
    "bad value": ("base: demo\ngrid: {positions.fraction: [0.1, 7]}", "positions.fraction: input should be less"),
    "bad key": ("base: demo\ngrid: {positions.fractoin: [0.1]}", "positions.fractoin: unknown key"),
    "key below a number": ("base: demo\nset: {seeds.x.y: 1}", "seeds: unknown key"),
    "bad name of a variant": ("base: demo\nvariants: {../x: {}}", "variants"),
    "unknown baseline": ("base: demo\nbaseline: x", "baseline: no recipe of the study is called 'x'"),
    "hub": ("base: demo\nset: {hub.repo: a/b}", "set.hub: not in a study"),
    "not a mapping": ("[1, 2]", "a study is a mapping"),
    "not UTF-8": (b"base: caf\xe9", "not a text file"),
    "grid beyond all bounds": (
        "base: demo\ngrid:\n" + "\n".join(f"  a{i}.b: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]" for i in range(12)), "grid: "
    ),
}  # fmt: skip


# ----- Arguments of the commands.


def command(name: str, line: str, message: str, **options: Any) -> Case:
    return Case(name, tuple(line.split()), message, **options)


COMMANDS = [
    command("no such command", "destill se_kd", "No such command 'destill'"),
    command("no recipe", "distill", "Missing argument 'RECIPE'"),
    command("unknown recipe", "distill se_k", r"neither a named recipe nor a file.*Did you mean 'se_kd'\?"),
    command("recipe's name too long", f"distill {LONG}", "too long for a path"),
    command("recipe's path too long", f"distill {'d/' * 3000}x.yaml", "too long for a path"),
    command("recipe is a folder", "distill {toy}", "neither a named recipe nor a file"),
    command("recipe from an address", "distill https://example.org/recipe.yaml", "not fetched from an address"),
    command("recipe from a device", "distill /dev/null", "neither a named recipe nor a file"),
    command("unknown option", f"distill {TOY} --ouput x", "No such option: --ouput"),
    command("out too long", f"distill {TOY} --out {LONG}", "Invalid value for '--out'.*too long"),
    Case("out with NUL", ("cache", "build", TOY, "--out", "a\udc00b"), "--out|encode|surrogate"),
    command("score: unknown key", f"score {TOY} --set data.pth=x", "data.pth: unknown key"),
    command("demo: bad value", "demo --set seed=x", "seed: input should be a valid integer"),
    command("cache build: live teacher", f"cache build {TOY} --set cache=null", "keeps the teacher live"),
    command("cache build: unknown recipe", "cache build nothing", "neither a named recipe nor a file"),
    command("cache import: live teacher", f"cache import {TOY} {{here}}/x.jsonl", "teacher.imported: expected true"),
    command("cache import: no files", f"cache import {TOY}", "FILES"),
    command("cache inspect: no folder", "cache inspect {here}/none", "no teacher cache at"),
    command("cache inspect: another folder", "cache inspect {toy}", "is not a teacher cache"),
    command("cache inspect: no samples", "cache inspect {toy} --samples 0", "--samples"),
    command("cache inspect: long name", f"cache inspect {LONG}", "too long for a path"),
    command("cache verify: no folder", "cache verify {here}/none", "no such folder"),
    command("cache verify: a file", f"cache verify {TOY}", "no such folder"),
    command("cache verify: less than none", "cache verify {toy} --rescore -1", "--rescore"),
    command("cache verify: recipe without use", "cache verify {toy} --recipe demo", "--recipe: .*--repair or --rescore"),
    command("verify: long name", f"verify {LONG}", "too long for a path"),
    command("report: no run", "report {toy}", "is not a run directory"),
    command("report: no folder", "report {here}/none", "is not a run directory"),
    command("report: long name", f"report {LONG}", "too long for a path"),
    command("report: nothing", "report", "Missing argument 'RUN...'"),
    command("report: baseline of one", "report {toy} --baseline x", "--baseline: one run has nothing"),
    command("report: several that are none", "report {toy} {here}", "is not a run directory"),
    command(
        "report: record is no JSON", "report {here}/run", "record.json: expected JSON",
        files={"run/record.json": "{", "run/recipe.yaml": "seed: 1"},
    ),
    command(
        "report: record is binary", "report {here}/run", "record.json: expected JSON, could not read it .'utf-8' codec",
        files={"run/record.json": b"\xff\xfe\0", "run/recipe.yaml": "seed: 1"},
    ),
    command(
        "report: record is a list", "report {here}/run", "record.json: expected a JSON object",
        files={"run/record.json": "[]", "run/recipe.yaml": "seed: 1"},
    ),
    command(
        "report: record nested too deep", "report {here}/run", "record.json: expected JSON",
        files={"run/record.json": "[" * 100_000, "run/recipe.yaml": "seed: 1"},
    ),
    command(
        "report: number of 5,000 digits", "report {here}/run", "record.json: expected JSON",
        files={"run/record.json": '{"a": ' + "9" * 5000 + "}", "run/recipe.yaml": "seed: 1"},
    ),
    command(
        "report: broken line of metrics", "report {here}/run", "metrics.jsonl, line 2: expected JSON",
        files={"run/record.json": "{}", "run/recipe.yaml": "seed: 1", "run/metrics.jsonl": '{"step": 1}\n{"st\n{}\n'},
    ),
    command(
        "report: scores are no table", "report {here}/run", "samples.parquet: not a whole file of sample scores",
        files={"run/record.json": "{}", "run/recipe.yaml": "seed: 1", "run/selection/samples.parquet": b"PAR1junkPAR1"},
    ),
    command(
        "report: examples of another shape", "report {here}/run", 'examples.json: expected a list "samples"',
        files={"run/record.json": "{}", "run/recipe.yaml": "seed: 1", "run/selection/examples.json": '{"samples": 3}'},
    ),
    command("report: out is another folder", "report {here}/a {here}/b --out {toy}", "not a report of several runs", files={
        "a/record.json": '{"recipe": {"seed": 1}}', "a/recipe.yaml": "seed: 1",
        "b/record.json": '{"recipe": {"seed": 2}}', "b/recipe.yaml": "seed: 2",
    }),
    command("recipes: unknown", "recipes se_k", r"no such recipe.*Did you mean 'se_kd'\?"),
    command("bench: unknown variant", f"bench {TOY} --variant flor", r"--variant: 'flor' is not known.*'floor'"),
    command("bench: no repeats", f"bench {TOY} --repeats 0", "--repeats"),
    command("bench: repeats are no number", f"bench {TOY} --repeats many", "--repeats"),
    command("bench: bad recipe", f"bench {TOY} --set seed=x", "seed: input should be a valid integer"),
    command("estimate: no accelerators", f"estimate {TOY} --gpus 0", "--gpus"),
    command("estimate: one token", f"estimate {TOY} --tokens 1", "--tokens"),
    command("estimate: bad recipe", f"estimate {TOY} --set teacher=3", "teacher: input should be a valid dictionary"),
    command("sweep: unknown study", "sweep demo_position", r"neither a named study nor a file.*'demo_positions'"),
    command("sweep: override of the seed", "sweep demo_positions --set seed=4", "overrides.seed: not set here"),
    command("sweep: malformed override", "sweep demo_positions --set x", "--set x: expected key.path=value"),
    command("sweep: unknown key", "sweep demo_positions --set positions.fractoin=0.1", "positions.fractoin: unknown key"),
    command("tokens: no model", "tokens", "Missing argument 'MODEL'"),
    command("tokens: unknown policy", "tokens {toy}/teacher w3 --policy topk", "--policy topk: .*'topk' is not known"),
    command("tokens: option of another policy", "tokens {toy}/teacher w3 --policy top_k,smoothing=2", "positions.smoothing"),
    command("tokens: no option", "tokens {toy}/teacher w3 --policy top_k,smooth", "is no option; expected key=value"),
    command("tokens: option twice", "tokens {toy}/teacher w3 --policy top_k,fraction=1,fraction=1", "fraction stands twice"),
    command("tokens: unreadable option", "tokens {toy}/teacher w3 --policy top_k,fraction=[", "fraction is not readable"),
    command("tokens: deep option", f"tokens x w3 --policy top_k,fraction={'[' * 3000}", "fraction is not readable"),
    command("tokens: date as an option", "tokens x w3 --policy top_k,fraction=2026-99-99", "positions.fraction: input"),
    command("tokens: progress", "tokens {toy}/teacher w3 --policy top_k,progress=2", "progress is the share"),
    command("tokens: progress not a number", "tokens {toy}/teacher w3 --policy top_k,progress=.nan", "progress is the share"),
    command("tokens: unknown metric", "tokens {toy}/teacher w3 --metric surprise", "--metric: 'surprise' is not known"),
    command("tokens: metric of a teacher", "tokens {toy}/teacher w3 --metric kl", "give --teacher MODEL"),
    command("tokens: fraction", "tokens {toy}/teacher w3 --fraction 2", "positions.fraction: input should be less"),
    command("tokens: fraction not a number", "tokens {toy}/teacher w3 --fraction nan", "positions.fraction: input"),
    command("tokens: length", "tokens {toy}/teacher w3 --max-length 1", "--max-length"),
    command("tokens: seed", "tokens {toy}/teacher w3 --seed -1", "--seed"),
    command("tokens: two texts", f"tokens {{toy}}/teacher w3 --file {TOY}", "TEXT and --file: give one"),
    command("tokens: no file", "tokens {toy}/teacher --file {here}/none", "--file .*can't be read"),
    command("tokens: a folder", "tokens {toy}/teacher --file {toy}", "--file .*can't be read"),
    command("tokens: binary", "tokens {toy}/teacher --file {here}/a", "is not UTF-8 text", files={"a": b"\xff\xfe\0a"}),
    command("tokens: blanks", "tokens {toy}/teacher --file {here}/a", "holds no text", files={"a": " \n"}),
    command("tokens: page over the text", "tokens {toy}/teacher --file {here}/a.html --html {here}/a.html",
            "--html .*the page would replace it", files={"a.html": "w3 w4"}),
    command("tokens: page into a folder", "tokens {toy}/teacher w3 --html {toy}", "--html"),
    command("tokens: page of a long name", f"tokens {{toy}}/teacher w3 --html {LONG}", "--html.*too long"),
    command("tokens: model of a long name", f"tokens {LONG} w3", "too long for a path"),
    command("prune-student: no layers", "prune-student --layers 0 --out {here}/s", "--layers"),
    command("prune-student: too many layers", "prune-student --layers 3000000000 --out {here}/s", "layers: input should be less"),
    command("prune-student: no out", "prune-student --layers 3", "Missing option '--out'"),
    command("prune-student: out exists", "prune-student --layers 3 --out {toy}", "exists. Give a new folder"),
    Case("prune-student: empty teacher", ("prune-student", "--layers", "3", "--out", "{here}/s", "--teacher", ""),
         "teacher.model: expected a path, but it is empty"),
    command("eval: nothing", "eval", "Missing argument"),
    command("eval: benchmark's option", "eval {toy}/teacher --shots 3", "shots: only benchmarks look at it"),
    command("eval: fidelity's option", "eval {toy}/teacher --suite paper --teacher demo", "teacher: only the suite fidelity"),
    command("eval: dtype", "eval {toy}/teacher --dtype int8", "dtype 'int8' is unknown"),
    command("eval: no rows", "eval {toy}/teacher --limit 0", "--limit"),
    command("eval: negative shots", "eval {toy}/teacher --shots -1", "--shots"),
    command("eval: no batch", "eval {toy}/teacher --batch-size 0", "--batch-size"),
    command("eval: two shapes", "eval {toy}/teacher --text-field a --prompt-field b", "data.prompt_field: a row has one shape"),
    command("eval: prompts alone", "eval {toy}/teacher --prompt-field b", "prompt_field: fidelity is measured on completions"),
    command("eval: folder of no data", "eval {toy}/teacher --suite paper --data {here}/none", "data: no folder"),
    command("eval: empty folder of data", "eval {toy}/teacher --suite paper --data {here}", "none of .* is in"),
    command("eval: text of a long name", f"eval {{toy}}/teacher --text {LONG}", "too long for a path"),
]  # fmt: skip


# ----- What models and data decide.


def data(name: str, file: str, content: str | bytes, message: str, *overrides: str) -> Case:
    path = ("--set", f"data.path={{here}}/{file}", "--set", "data.held_out_fraction=0", "--set", "evaluation.suite=[]")
    extra = tuple(word for override in overrides for word in ("--set", override))
    return Case(f"data: {name}", ("distill", TOY, *path, *extra, *RUN), message, {file: content}, needs_models=True)


ROW = '{"text": "w3 w4 w5"}\n'
DATA = [
    data("empty file", "a.jsonl", "", "holds no text"),
    data("blank text", "a.txt", " \n\n ", "holds no text"),
    data("blank rows", "a.jsonl", '{"text": " "}\n', "holds no text"),
    data("broken line", "a.jsonl", ROW + '{"text": "w3\n', "a.jsonl, line 2 is not valid JSON"),
    data("line cut in the middle", "a.jsonl", ROW * 3 + '{"text"', "a.jsonl, line 4 is not valid JSON"),
    data("line is a list", "a.jsonl", ROW + "[1]\n", "a.jsonl, line 2: expected an object"),
    data("line is a number", "a.jsonl", "7\n", "a.jsonl, line 1: expected an object"),
    data("text is a number", "a.jsonl", '{"text": 7}\n', "'text' of .*a.jsonl, line 1 is int, expected text"),
    data("another field", "a.jsonl", '{"body": "w3"}\n', "line 1 has no field 'text'; it has body"),
    data("number of 5,000 digits", "a.jsonl", '{"text": ' + "9" * 5000 + "}\n", "a.jsonl, line 1 is not valid JSON"),
    data("nested too deep", "a.jsonl", '{"text": ' + "[" * 100_000 + "\n", "a.jsonl, line 1 is not valid JSON"),
    data("half a surrogate pair", "a.jsonl", '{"text": "\\ud800"}\n', "line 1 holds half of a surrogate pair"),
    data("UTF-16", "a.jsonl", ROW.encode("utf-16"), "a.jsonl is not UTF-8 text"),
    data("latin-1", "a.txt", "café".encode("latin-1"), "a.txt is not UTF-8 text"),
    data("binary", "a.jsonl", bytes(range(256)), "a.jsonl is not UTF-8 text"),
    data("NUL", "a.jsonl", "\0\0\0\n", "a.jsonl, line 1 is not valid JSON"),
    data("broken line of 10 MB", "a.jsonl", '{"text": "' + "w3 " * 3_300_000, "a.jsonl, line 1 is not valid JSON"),
    data("no Parquet", "a.parquet", b"PAR1" + b"x" * 100, "a.parquet can't be read as Parquet"),
    data("another suffix", "a.csv", "text\nw3", "data.path: expected a file that ends in"),
    data("pickle", "a.pkl", b"\x80\x04N.", "data.path: expected a file that ends in"),
    data("too little text", "a.jsonl", '{"text": "w3"}\n', "data.path|no sample|too short|one token"),
    data("no file", "b/a.jsonl", ROW, "there is no file or folder", "data.path={here}/none.jsonl"),
    data("empty folder", "b/c/x", "", "data|no file|empty", "data.path={here}/b"),
    data("field of the demo text", "a.jsonl", ROW, "data.text_field: the demo text has no fields", "data.path=demo", "data.text_field=x"),
    data("longer than the model's window", "a.jsonl", ROW * 90, "data.max_length: 128 tokens, but .* has positions for 64",
         "data.max_length=128"),
]  # fmt: skip


def altered(name: str, message: str, change: Callable[[Path], None]) -> Case:
    """A distillation from a copy of the toy teacher that ``change`` has altered."""

    def prepare(here: Path, toy: Path) -> None:
        shutil.copytree(toy / "teacher", here / "teacher")
        change(here / "teacher")

    arguments = ("distill", TOY, "--set", "teacher.model={here}/teacher", *RUN)
    return Case(f"model: {name}", arguments, message, prepare=prepare, needs_models=True)


def configured(**changes: Any) -> Callable[[Path], None]:
    """Changes config.json; None removes a key."""
    return lambda folder: edit(folder / "config.json", changes)


def edit(path: Path, changes: Mapping[str, Any]) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def written(file: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / file).write_bytes(content.encode() if isinstance(content, str) else content) and None
    )


def removed(*files: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / file).unlink() for file in files] and None


def truncated(file: str, share: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: int(len(content) * share)])

    return change


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_end(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", dict.fromkeys(("eos_token", "pad_token", "unk_token")))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)


def remote_code(folder: Path) -> None:
    edit(
        folder / "config.json",
        {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}},
    )
    (folder / "evil.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")


TOKENIZER = "model .*teacher'.*tokenizer"
MODELS = [
    altered("no config.json", "has no config.json", removed("config.json")),
    altered("no weights", r"has no \*.safetensors weights", removed("model.safetensors")),
    altered("pickled weights", r"has no \*.safetensors weights. Other formats \(pickled", pickled),
    altered("config.json is no JSON", "config.json is not JSON", written("config.json", "{")),
    altered("config.json is a list", "config.json holds a list, not an object", written("config.json", "[]")),
    altered("config.json is binary", "config.json is not JSON", written("config.json", b"\xff\xfe\0\0")),
    altered("config.json nested too deep", "config.json is not JSON", written("config.json", "[" * 100_000)),
    altered("config.json is empty", "config.json is not JSON", written("config.json", "")),
    altered("unknown kind of model", "its configuration can't be read|can't be loaded", configured(model_type="nothing")),
    altered("no kind of model", "its configuration can't be read|can't be loaded", configured(model_type=None)),
    altered("kind that makes no text", "can't be loaded as a causal language model", configured(model_type="vit")),
    altered("code of its own", "its configuration can't be read|can't be loaded", remote_code),
    altered("hidden size of 10^12", "model .*hidden_size", configured(hidden_size=10**12)),
    altered("vocabulary of 10^12", "model .*vocab_size", configured(vocab_size=10**12)),
    altered("10^9 layers", "model .*num_hidden_layers", configured(num_hidden_layers=10**9)),
    altered("negative layers", "model .*num_hidden_layers", configured(num_hidden_layers=-1)),
    altered("hidden size in words", "model .*hidden_size", configured(hidden_size="large")),
    altered("hidden size of 0", "model .*hidden_size", configured(hidden_size=0)),
    altered("vocabulary of 0", "model .*vocab_size", configured(vocab_size=0)),
    altered("negative vocabulary", "model .*vocab_size", configured(vocab_size=-5)),
    altered("more layers than weights", "weights of LlamaForCausalLM are not in", configured(num_hidden_layers=9)),
    altered("another hidden size", "model .*can't be loaded|are not in", configured(hidden_size=64)),
    altered("vocabulary below the tokenizer's", "the teacher has 40 classes, but the tokenizer uses", configured(vocab_size=40)),
    altered("no window", "max_position_embeddings", configured(max_position_embeddings=0)),
    altered("heads that do not divide", "model .*", configured(num_attention_heads=7)),
    altered("weights cut", "can't be loaded", truncated("model.safetensors", 0.7)),
    altered("weights without header", "4 bytes, can't hold", written("model.safetensors", b"\0" * 4)),
    altered("weights with a header of 10^18 bytes", "8 bytes, can't hold", written("model.safetensors", (10**18).to_bytes(8, "little"))),
    altered("weights are a pickle", "can't be loaded", written("model.safetensors", b"\x80\x04cos\nsystem\n." * 9000)),
    altered("weights are empty", "can't be loaded", written("model.safetensors", b"")),
    altered("no tokenizer", TOKENIZER, removed("tokenizer.json", "tokenizer_config.json")),
    altered("tokenizer.json cut", TOKENIZER, truncated("tokenizer.json", 0.5)),
    altered("tokenizer.json is empty", TOKENIZER, written("tokenizer.json", "")),
    altered("tokenizer.json is an empty object", TOKENIZER, written("tokenizer.json", "{}")),
    altered("tokenizer.json is a list", TOKENIZER, written("tokenizer.json", "[]")),
    altered("tokenizer.json is binary", TOKENIZER, written("tokenizer.json", b"\xff\xfe\0")),
    altered("tokenizer.json of another model", TOKENIZER, lambda folder: edit(folder / "tokenizer.json", {"model": {"type": "x"}})),
    altered("tokenizer.json without a model", TOKENIZER, lambda folder: edit(folder / "tokenizer.json", {"model": None})),
    altered("tokenizer_config.json cut", TOKENIZER, truncated("tokenizer_config.json", 0.5)),
    altered("tokenizer_config.json is a list", TOKENIZER, written("tokenizer_config.json", "[]")),
    altered("tokenizer_config.json is a number", TOKENIZER, written("tokenizer_config.json", "7")),
    altered("end token is a number", TOKENIZER, lambda folder: edit(folder / "tokenizer_config.json", {"eos_token": 7})),
    altered("tokenizer of an unknown class", TOKENIZER,
            lambda folder: edit(folder / "tokenizer_config.json", {"tokenizer_class": "Nothing", "auto_map": {"AutoTokenizer": ["evil.T", None]}})),
    altered("tokenizer without end token", "no padding, unknown or end token|no end token|eos", without_end),
    Case("model: no such folder", ("distill", TOY, "--set", "teacher.model={here}/a/b/c", *RUN), "there is no such folder",
         needs_models=True),
    Case("model: not in the hub", ("distill", TOY, "--set", "teacher.model=nobody/nothing", *RUN), "could not be fetched",
         needs_models=True),
    Case("model: up and out", ("distill", TOY, "--set", "teacher.model=../../../etc", *RUN), "there is no such folder",
         needs_models=True),
    Case("model: too many layers kept", ("distill", TOY, "--set", "student.prune_from_teacher.layers=4", *RUN), "1 to 3 can be kept",
         needs_models=True),
]  # fmt: skip


def set_(
    name: str, message: str, *overrides: str, out: str = "{here}/run", files: Mapping[str, str | bytes] | None = None
) -> Case:
    """A distillation of the toy with ``overrides`` that this machine, or what lies on its disk, can't do."""
    words = tuple(word for override in overrides for word in ("--set", override))
    return Case(name, ("distill", TOY, *words, "--out", out), message, files or {}, needs_models=True)


CHAT = [
    "data={path: '{here}/a.jsonl', messages_field: m, max_length: 32, held_out_fraction: 0, packing: false}",
    "evaluation.suite=[]",
]
TALK = '{"m": [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4 w5"}]}\n' * 8


def templated(name: str, template: str) -> Case:
    def prepare(here: Path, toy: Path) -> None:
        shutil.copytree(toy / "teacher", here / "teacher")
        (here / "teacher" / "chat_template.jinja").write_text(template)
        (here / "a.jsonl").write_text(TALK)

    words = tuple(word for override in (*CHAT, "teacher.model={here}/teacher") for word in ("--set", override))
    return Case(
        f"template: {name}", ("distill", TOY, *words, *RUN), "chat template", prepare=prepare, needs_models=True
    )


MACHINE = [
    set_("cache.path of another folder", "not a teacher cache|cache.path", "cache.path={here}/c", files={"c/notes.txt": "mine"}),
    set_("cache.path is a file", "cache.path|not a folder", "cache.path={here}/c", files={"c": "mine"}),
    set_("cache.path below a file", "cache.path", "cache.path={here}/c/d", files={"c": "mine"}),
    set_("cache.path that can't be made", "cache.path", "cache.path=/proc/selkd"),
    set_("cache.path of an unknown protocol", "cache.path", "cache.path=nothing://x/y"),
    set_("samples.path below a file", "samples.path", "samples.path={here}/c/d.parquet", files={"c": "mine"}),
    set_("samples.path is a folder", "samples.path", "samples.path={here}/c", files={"c/x": "mine"}),
    set_("samples.path is another file", "samples.path|expected", "samples.path={here}/c.parquet", files={"c.parquet": "mine"}),
    set_("out is a file", "--out", out="{here}/c", files={"c": "mine"}),
    set_("out below a file", "--out", out="{here}/c/d", files={"c": "mine"}),
    set_("out is another folder", "not a run|--out", out="{here}/c", files={"c/notes.txt": "mine"}),
    set_("out that can't be made", "--out", out="/proc/selkd"),
    set_("out with a recipe that is none", "recipe.yaml", out="{here}/c", files={"c/recipe.yaml": "{"}),
    set_("logging that is not installed", "training.report_to: wandb needs the package wandb: pip install", "training.report_to=wandb"),
    set_("logging that there is not", "training", "training.report_to=nothing"),
    set_("optimiser that is not installed", "training.optim: adamw_bnb_8bit needs the package bitsandbytes", "training.optim=adamw_bnb_8bit"),
    set_("arguments of the optimiser", "training", "training.optim_args=x"),
    set_("arguments of the schedule", "training.*nothing", "training.lr_scheduler_type=cosine", "training.lr_scheduler_kwargs={nothing: 1}"),
    set_("schedule without its argument", "training.*min_lr", "training.lr_scheduler_type=cosine_with_min_lr"),
    set_("shards of one process", "fsdp", "training.fsdp=full_shard"),
    set_("device that is not here", "teacher.device", "teacher.device=cuda:7"),
    set_("debugging that there is not", "training", "training.debug=everything"),
    set_("benchmark data that is not here", "data: no folder", "evaluation={suite: [paper], data: '{here}/none'}"),
    templated("not closed", "{% if %}"),
    templated("looks into Python", "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for m in messages %}{{ m.content }}{% endfor %}"),
    templated("raises", "{{ raise_exception('no') }}"),
    templated("never ends", "{% for i in range(10 ** 12) %}x{% endfor %}"),
    templated("reads a file", "{% include '/etc/passwd' %}"),
]  # fmt: skip


def spoken(name: str, row: str, message: str) -> Case:
    """A distillation on a conversation that is none, with a chat template."""

    def prepare(here: Path, toy: Path) -> None:
        shutil.copytree(toy / "teacher", here / "teacher")
        (here / "teacher" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
        (here / "a.jsonl").write_text(row + "\n")

    words = tuple(word for override in (*CHAT, "teacher.model={here}/teacher") for word in ("--set", override))
    return Case(f"conversation: {name}", ("distill", TOY, *words, *RUN), message, prepare=prepare, needs_models=True)


CONVERSATIONS = [
    spoken("role is a number", '{"m": [{"role": 3, "content": "w3"}]}', "data.messages_field: 'm' of .*line 1 holds"),
    spoken("empty", '{"m": []}', "data.messages_field: 'm' of .*line 1 is list"),
    spoken("a text", '{"m": "w3"}', "data.messages_field: 'm' of .*line 1 is str"),
    spoken(
        "calls a tool", '{"m": [{"role": "user", "content": "w3", "tool_calls": [1]}]}', "a message with tool_calls"
    ),
]

CASES = [
    *(Case(f"recipe: {name}", ("distill", "{here}/r.yaml", *RUN), message, {"r.yaml": content})
      for name, (content, message) in YAML.items()),
    *(Case(f"--set {override:.60}", ("distill", TOY, "--set", override, *RUN), message) for override, message in VALUES.items()),
    *(Case(f"study: {name}", ("sweep", "{here}/s.yaml", "--out", "{here}/study"), message, {"s.yaml": content})
      for name, (content, message) in STUDIES.items()),
    *COMMANDS, *DATA, *CONVERSATIONS, *MODELS, *MACHINE,
]  # fmt: skip
