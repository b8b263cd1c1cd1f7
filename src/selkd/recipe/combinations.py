"""Which choices of one training go together: one check for recipes and for ``DistillArguments``."""

from selkd.plugins import Metric, Policy, Sampler
from selkd.recipe.choices import ClassOptions, CriterionOptions, OnPolicyOptions, PositionOptions
from selkd.recipe.data import RowOptions
from selkd.recipe.part import LARGEST_COUNT


def check_combination(
    criterion: CriterionOptions,
    positions: PositionOptions,
    classes: ClassOptions,
    on_policy: OnPolicyOptions | None,
    data: RowOptions,
) -> None:
    """Refuse parts that do not go together.

    Raises:
        ValueError: two parts exclude each other; the message has the key, the reason and the way out.
    """
    check_loss(criterion, classes)
    if (positions.skip_first or 0) >= data.max_length - 1:
        raise ValueError(
            f"positions.skip_first: {positions.skip_first} leaves no position of samples of data.max_length = "
            f"{data.max_length} tokens; lower it"
        )
    if on_policy is not None:
        _check_on_policy(on_policy, criterion, data)
    elif data.is_prompt_only:
        raise ValueError(
            "data.completion_field: without completions there is nothing to learn from; give it, or let the student "
            "answer (on_policy: {})"
        )


def check_loss(criterion: CriterionOptions, classes: ClassOptions) -> None:
    """Raises ValueError for drawn classes with a criterion whose gradient they would bias."""
    if classes.sampler != "all" and criterion.name != "forward_kl":
        raise ValueError(
            f"criterion.name: {criterion.name} of drawn classes would be a biased estimate: drawn classes give forward "
            "KL's gradient alone without bias (E[c/U] = p enters it linearly); take criterion.name: forward_kl, or "
            "classes.sampler: all with a live teacher (cache: null)"
        )


def check_batch(per_device: int, data: RowOptions) -> None:
    """Raises ValueError for a micro-batch with more positions than kernels index."""
    if per_device * data.max_length > LARGEST_COUNT:
        raise ValueError(
            f"per_device_train_batch_size: {per_device:,} samples of data.max_length = {data.max_length:,} tokens have "
            f"more positions than a tensor's 31-bit index reaches ({LARGEST_COUNT:,}); lower it, and raise "
            "gradient_accumulation_steps"
        )


SCORING_SHARE = 0.25  # of a position's draws, which score it where nothing else is said (docs/results/cache.md)
_LIVE = "a live teacher (in a recipe, set cache: null)"


def check_cached(positions: PositionOptions, classes: ClassOptions, temperature: float, *, has_scalars: bool) -> None:
    """Check that a teacher cache can score positions.

    Args:
        classes: how the cache's classes were drawn.
        temperature: at which they were drawn.
        has_scalars: whether the cache has the teacher's entropy and log p(y).

    Raises:
        ValueError: the metric can't be computed from it, or not with ``positions.scoring_draws`` or the policy.
    """
    metric = None if positions.metric is None else Metric.find(positions.metric)
    if metric is not None and metric.needs_teacher:
        check_cached_metric("positions.metric", metric, classes, temperature, has_scalars=has_scalars)
    if metric is None or not metric.uses_draws:
        if positions.scoring_draws is not None:
            raise ValueError(
                "positions.scoring_draws: only a metric with KL(p || q) is estimated from a cache's draws; leave it out"
            )
    elif classes.draws is None or n_scoring_draws(positions, classes.draws) >= classes.draws:
        raise ValueError(
            f"positions.scoring_draws: expected fewer than the {classes.draws} draws of a position "
            f"(classes.draws), as the loss uses the others; raise classes.draws, or take {_LIVE}"
        )
    elif Policy.find(positions.policy).is_corrected:
        raise ValueError(
            f"positions.policy: {positions.policy} is Full KD in expectation only where every score is above 0, and "
            f"{metric.name} of a cache is an estimate, which chance may put below: such a position could never be "
            f"drawn, and nothing would stand for it; take positions.metric: student_entropy, or {_LIVE}"
        )


def n_scoring_draws(positions: PositionOptions, draws: int) -> int:
    """How many of a position's ``draws`` score it where the metric is estimated from them; the loss has the others."""
    return max(1, round(SCORING_SHARE * draws)) if positions.scoring_draws is None else positions.scoring_draws


def check_cached_metric(
    key: str, metric: Metric, classes: ClassOptions, temperature: float, *, has_scalars: bool
) -> None:
    """Raises ValueError for a metric of the teacher that can't be had from a cache; ``key`` is the recipe's."""
    if metric.is_own or not metric.is_from_draws:
        raise ValueError(
            f"{key}: {metric.name} needs the teacher's full distribution at every position, and a cache holds drawn "
            f"classes alone: the student may give weight to classes that were not drawn; take kl, ce_ratio, a metric "
            f"of the student (student_entropy, student_ce), or {_LIVE}"
        )
    if not has_scalars:
        raise ValueError(
            f"{key}: {metric.name} needs the teacher's entropy and its log p(y), and this cache holds drawn classes "
            "alone; build one with scalars from a model here (in a recipe, cache.scalars: true), take a metric of the "
            f"student (student_entropy, student_ce), or {_LIVE}"
        )
    if not metric.uses_draws:
        return
    if not Sampler.find(classes.sampler).is_unbiased:
        unbiased = " or ".join(name for name, entry in Sampler.builtin().items() if entry.is_unbiased)
        raise ValueError(
            f"{key}: {metric.name} is estimated from unbiased draws, and those of classes.sampler: {classes.sampler} "
            f"are not known to be; draw with {unbiased}, take teacher_entropy, teacher_ce or ce_ratio, or {_LIVE}"
        )
    if temperature != 1.0:
        raise ValueError(
            f"{key}: {metric.name} is at temperature 1, and this cache's classes are drawn at {temperature:g}; set "
            f"criterion.temperature: 1.0, take teacher_entropy, teacher_ce or ce_ratio, or {_LIVE}"
        )


def check_sharded(on_policy: OnPolicyOptions | None, has_adapters: bool) -> None:
    """Raises ValueError for what can't be done with a student that FSDP shards."""
    if has_adapters:
        raise ValueError("fsdp: adapters (a recipe's student.lora) are trained on one GPU or with DDP")
    if on_policy is not None:
        raise ValueError("on_policy: a student sharded by FSDP does not generate; use one GPU, or DDP")


def on_policy_criterion(criterion: CriterionOptions) -> CriterionOptions:
    """The criterion of an on-policy training: reverse KL, unless another one is named."""
    if "name" in criterion.model_fields_set:
        return criterion
    return CriterionOptions.model_validate({**criterion.model_dump(exclude_unset=True), "name": "reverse_kl"})


def _check_on_policy(options: OnPolicyOptions, criterion: CriterionOptions, data: RowOptions) -> None:
    if criterion.kd_weight < 1:
        raise ValueError(
            f"criterion.kd_weight: expected 1.0 beside on_policy, got {criterion.kd_weight}. Cross-entropy would teach "
            "the student the very tokens that it drew; set it to 1.0, and keep some of the data's completions with "
            "on_policy.fraction"
        )
    if not data.has_prompts:
        raise ValueError(
            "on_policy: the student answers prompts, and data.text_field has none; give data.prompt_field or "
            "data.messages_field"
        )
    if data.loss_on == "all":
        raise ValueError("data.loss_on: all learns prompts, and on_policy what the student answers; leave it out")
    if data.packing:
        raise ValueError("data.packing: on_policy answers one prompt a sample; set data.packing: false")
    if data.is_prompt_only and options.fraction < 1:
        raise ValueError(
            "on_policy.fraction: below 1 the other samples keep their completion, and there is none; give "
            "data.completion_field, or 1.0"
        )
    if options.temperature == 0 and options.top_p < 1:
        raise ValueError("on_policy.top_p: without effect at temperature 0, which takes the most likely; leave it")
