"""TRL's and Liger's distillation losses beside ours: the same models, batch and precision, all positions, forward KL.

    pip install -e '.[peers]'
    python benchmarks/peers.py [RECIPE] [--set KEY=VALUE ...] [--repeats 5]

One process, in turns, medians; ratios to the floor of the same run. Memory: a process of its own for each. Every step
runs both bodies as ours does and hands the losses the same hidden states and heads: TRL's ``ChunkedDivergenceFunction``
(``DistillationTrainer``), Liger's ``LigerFusedLinearJSDLoss`` with beta 0, compiled where --compile is given. Agreement
with plain Full KD: the loss, and the cosine of the gradients of all the student's weights. A library that is not
installed, or does not run here, is said so and left out.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from selkd.bench.measure import interleaved, peak_bytes
from selkd.bench.subject import BenchSubject
from selkd.bench.variants import plain_loss, step_of
from selkd.models.head import head_of, hidden_states
from selkd.recipe.files import load_recipe

Loss = Callable[[], Tensor]
OURS = ("floor", "full_kd_plain", "full_kd")
PEERS = {"trl": "trl", "liger": "liger-kernel"}  # name -> package


def hidden_of_both(subject: BenchSubject) -> tuple[Tensor, Tensor]:
    """The student's hidden states [N, D] with gradient and the teacher's, at the valid positions."""
    valid = subject.batch["valid_mask"]
    with torch.no_grad():
        teachers = hidden_states(subject.teacher, **subject.inputs)[valid]
    with subject.autocast():
        return hidden_states(subject.student, **subject.inputs)[valid], teachers


def trl_loss(subject: BenchSubject) -> Loss:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    students_head, teachers_head = subject.head, head_of(subject.teacher).slice_vocab(subject.work.vocab_size)

    def loss() -> Tensor:
        student, teacher = hidden_of_both(subject)
        with subject.autocast():
            values, _ = ChunkedDivergenceFunction.apply(
                student, students_head.weight, students_head.bias, teacher, teachers_head.weight, teachers_head.bias,
                0.0, 1.0, students_head.scale, students_head.softcap, teachers_head.scale, teachers_head.softcap,
            )  # fmt: skip
        return values.mean()

    return loss


def liger_loss(subject: BenchSubject, is_compiled: bool) -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    fused = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=is_compiled)
    students_head, teachers_head = subject.head, head_of(subject.teacher).slice_vocab(subject.work.vocab_size)
    for head in (students_head, teachers_head):
        if head.scale != 1.0 or head.softcap is not None:
            raise RuntimeError("its fused loss knows no logit scale and no softcapping")
    targets = subject.batch["targets"][subject.batch["valid_mask"]]

    def loss() -> Tensor:
        student, teacher = hidden_of_both(subject)
        with subject.autocast():
            # Its products don't look at autocast's dtype in a compiled chunk: all are given in it.
            found: Tensor = fused(
                student.to(subject.dtype), students_head.weight.to(subject.dtype), teacher.to(subject.dtype),
                teachers_head.weight.to(subject.dtype), targets,
                None if students_head.bias is None else students_head.bias.to(subject.dtype),
                None if teachers_head.bias is None else teachers_head.bias.to(subject.dtype),
            )  # fmt: skip
        return found

    return loss


def losses_of(subject: BenchSubject, names: list[str], is_compiled: bool) -> tuple[dict[str, Loss], dict[str, str]]:
    """The peers' losses that run here, and of the others why not."""
    found: dict[str, Loss] = {}
    missing: dict[str, str] = {}
    makers = {"trl": trl_loss, "liger": lambda subject: liger_loss(subject, is_compiled)}
    for name in names:
        package = PEERS[name]
        try:
            version(package)
            loss = makers[name](subject)
            loss().backward()
            found[name] = loss
        except PackageNotFoundError:
            missing[name] = f"{package} is not installed: pip install -e '.[peers]'"
        except Exception as error:  # noqa: BLE001  whatever a peer raises on this machine
            missing[name] = f"{package} does not run here: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
        subject.student.zero_grad(set_to_none=True)
    return found, missing


def stepped(subject: BenchSubject, loss: Loss) -> Callable[[], None]:
    def step() -> None:
        loss().backward()
        subject.student.zero_grad(set_to_none=True)

    return step


def gradient_of(subject: BenchSubject, loss: Loss) -> tuple[float, Tensor]:
    value = loss()
    value.backward()
    flat = torch.cat([p.grad.flatten() for p in subject.student.parameters() if p.grad is not None])
    subject.student.zero_grad(set_to_none=True)
    return float(value.detach()), flat


def peak_of(name: str) -> int:
    """Peak memory of one of the steps, from a process of its own with this one's arguments."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", name]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="demo")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="torch.compile Liger's chunks, as it does by default")
    parser.add_argument("--peak-of", choices=[*OURS, *PEERS], help=argparse.SUPPRESS)
    given = parser.parse_args()

    subject = BenchSubject(load_recipe(given.recipe, given.overrides))
    try:
        if given.peak_of in OURS:
            print(peak_bytes(step_of(given.peak_of, subject), subject.device))
            return
        wanted = list(PEERS) if given.peak_of is None else [given.peak_of]
        losses, missing = losses_of(subject, wanted, given.compile)
        if given.peak_of is not None:
            print(peak_bytes(stepped(subject, losses[given.peak_of]), subject.device))
            return
        steps = {name: step_of(name, subject) for name in OURS}
        steps |= {name: stepped(subject, loss) for name, loss in losses.items()}
        timings = interleaved(steps, given.repeats, subject.device)
        peaks = {name: peak_of(name) for name in steps}
        plain, plain_gradient = gradient_of(subject, lambda: plain_loss(subject))
        agreement = {}
        for name, loss in losses.items():
            value, gradient = gradient_of(subject, loss)
            cosine = torch.cosine_similarity(gradient.double(), plain_gradient.double(), dim=0)
            agreement[name] = {"loss": value, "gradient_cosine": float(cosine)}
        floor = timings["floor"].median
        answer = {
            "versions": {name: version(PEERS[name]) for name in losses},
            "not_measured": missing,
            "floor_seconds": floor,
            "full_kd_plain_loss": plain,
            "variants": [
                {
                    "name": name,
                    "ratio_to_floor": timing.median / floor,
                    "cpu_ratio_to_floor": timing.cpu_median / timings["floor"].cpu_median,
                    "ratio_range": [min(timing.seconds) / floor, max(timing.seconds) / floor],
                    "peak_bytes_above_floor": peaks[name] - peaks["floor"],
                    **agreement.get(name, {}),
                }
                for name, timing in timings.items()
            ],
        }
        print(json.dumps(answer, indent=2))
    finally:
        subject.close()


if __name__ == "__main__":
    main()
