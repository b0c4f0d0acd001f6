"""Why an RLJob is refused: every reason at once, each with path, value, reason and remedy.

Two layers: the models' own bounds (translated from pydantic), and rules that need more than one field. What the rules
say is also what the CRD's CEL will say, so each has one fixed text.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.alias_generators import to_snake
from pydantic_core import ErrorDetails

from rljob_api.errors import SpecError, Violation
from rljob_api.spec import Model, OldLogprobs, RLJob, RLJobSpec, Sampling

LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
NAME_LENGTH, POOL_NAME_LENGTH = 40, 16
BYTES_PER_TOKEN = 16
"""Token, turn, version and log-probability in a trajectory message."""
MESSAGE_OVERHEAD_BYTES = 64 << 10
NEUTRAL_SAMPLING: dict[str, object] = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_tokens": 0,
    "logit_bias": {},
    "bad_words": (),
    "guided_decoding": None,
}


def parse_job(document: object) -> RLJob:
    """The RLJob that a document holds.

    Raises:
        SpecError: with every violation.
    """
    violations = violations_of(document)
    if violations:
        raise SpecError(violations)
    return _read(document)


def violations_of(document: object) -> tuple[Violation, ...]:
    """Everything that is wrong with a document; empty when it is a valid RLJob."""
    if not isinstance(document, Mapping):
        return (
            Violation("", _show(document), "an RLJob is a mapping", "Start with apiVersion, kind, metadata and spec"),
        )
    try:
        job = _read(document)
    except ValidationError as error:
        problems = error.errors()
        # A list whose item failed is also reported as too short: that is the same fault twice.
        inner = {problem["loc"][:depth] for problem in problems for depth in range(1, len(problem["loc"]))}
        found = [_translate(p) for p in problems if not (p["type"] == "too_short" and p["loc"] in inner)]
        return tuple(dict.fromkeys((*found, *_rules_despite_errors(document, error))))
    return tuple(_rules(job))


def _read(document: object) -> RLJob:
    """Strictly, as the API server does: "4" is no integer and 1 is no boolean, while lists and enum names are as in JSON."""
    return RLJob.model_validate_json(json.dumps(document), strict=True)


def ignored_locally(job: RLJob) -> tuple[str, ...]:
    """Fields that are set and that `rljob run` does not use: they speak to Kubernetes."""
    spec = job.spec
    checks: list[tuple[str, bool]] = [
        ("spec.suspend", spec.suspend),
        ("spec.activeDeadlineSeconds", spec.active_deadline_seconds is not None),
        ("spec.startDeadlineSeconds", "start_deadline_seconds" in spec.model_fields_set),
        ("spec.ttlSecondsAfterFinished", spec.ttl_seconds_after_finished is not None),
        ("spec.failurePolicy.rules", bool(spec.failure_policy.rules)),
        ("spec.messaging.credentialsSecretRef", spec.messaging.credentials_secret_ref is not None),
        ("spec.trainer.template", spec.trainer.template is not None),
        ("spec.trainer.stallSeconds", "stall_seconds" in spec.trainer.model_fields_set),
        (
            "spec.storage.checkpoint.persistentVolumeClaim.claimName",
            spec.storage.checkpoint.persistent_volume_claim is not None,
        ),
        (
            "spec.storage.weights.persistentVolumeClaim.claimName",
            spec.storage.weights.persistent_volume_claim is not None,
        ),
    ]
    for index, pool in enumerate(spec.rollout_pools):
        checks.append((f"spec.rolloutPools[{index}].template", pool.template is not None))
        checks.append((f"spec.rolloutPools[{index}].minReplicas", "min_replicas" in pool.model_fields_set))
    return tuple(path for path, is_set in checks if is_set)


def largest_trajectory_bytes(spec: RLJobSpec) -> int:
    """Size of the largest trajectory message that the spec allows."""
    return spec.sampling.max_trajectory_tokens * BYTES_PER_TOKEN + MESSAGE_OVERHEAD_BYTES


# ------------------------------------------------------------------------------------------------------ field by field


def _translate(problem: ErrorDetails) -> Violation:
    path, value = _path(problem["loc"]), _show(problem["input"])
    context = problem.get("ctx") or {}
    match problem["type"]:
        case "missing":
            return Violation(path, "", "is required", "Set it")
        case "extra_forbidden":
            return _unknown_field(problem["loc"], value)
        case "enum" | "literal_error":
            return Violation(path, value, "is not one of the known values", f"Use {context.get('expected', '')}")
        case "greater_than_equal" | "greater_than" | "less_than_equal" | "less_than":
            word = {
                "greater_than_equal": "at least",
                "greater_than": "more than",
                "less_than_equal": "at most",
                "less_than": "less than",
            }[problem["type"]]
            bound = next(iter(context.values()))
            return Violation(path, value, f"must be {word} {bound}", "Choose a value within the bound")
        case "too_short" | "string_too_short":
            return Violation(path, value, "is too short or empty", f"Give at least {context.get('min_length', 1)}")
        case "too_long" | "string_too_long":
            return Violation(path, value, "is too long", f"Give at most {context.get('max_length')}")
        case kind if kind.startswith(("int", "float", "bool", "string", "dict", "tuple", "model", "finite")):
            wanted = _WANTED.get(kind.split("_")[0], "another type")
            return Violation(
                path, value, f"must be {wanted}", "Write the value without quotes, or as the type asked for"
            )
        case _:
            return Violation(path, value, problem["msg"], "See `rljob` documentation of this field")


_WANTED = {
    "int": "an integer",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "dict": "a mapping",
    "tuple": "a list",
    "model": "a mapping",
}


def _unknown_field(location: tuple[int | str, ...], value: str) -> Violation:
    known = _fields_at(location[:-1])
    near = difflib.get_close_matches(str(location[-1]), known, 1)
    hint = f"Did you mean {near[0]}?" if near else f"Known here: {', '.join(sorted(known))}"
    return Violation(_path(location), value, "unknown field", hint)


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    """Wire names of the fields at a place of the RLJob."""
    model: type[BaseModel] = RLJob
    for part in location:
        if isinstance(part, int):
            continue
        found = model.model_fields.get(to_snake(part))
        inner = None if found is None else next(_models_in(found.annotation), None)
        if inner is None:
            return []
        model = inner
    return [field.alias or name for name, field in model.model_fields.items()]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models_in(argument)


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


def _show(value: object) -> str:
    if value is None:
        return "null"
    shown = {True: "true", False: "false"}.get(value) if isinstance(value, bool) else None
    text = shown if shown is not None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ----------------------------------------------------------------------------------------------- more than one field


def _rules_despite_errors(document: Mapping[Any, Any], error: ValidationError) -> tuple[Violation, ...]:
    """Rules over what is left when the faulty fields are taken out, so that one run names everything it can."""
    pruned = _without(document, [problem["loc"] for problem in error.errors()])
    try:
        return tuple(_rules(_read(pruned)))
    except ValidationError:
        return tuple(_rules_of_parts(pruned))


def _rules_of_parts(document: Mapping[Any, Any]) -> Iterator[Violation]:
    """Rules that need only a part of the job, when the whole cannot be read."""
    metadata, spec = document.get("metadata"), document.get("spec")
    if isinstance(metadata, Mapping) and isinstance(metadata.get("name"), str):
        yield from _job_name_rules(metadata["name"])
    if not isinstance(spec, Mapping):
        return
    for field, model, rules in (("sampling", Sampling, _sampling_rules), ("model", Model, _model_rules)):
        try:
            yield from rules(model.model_validate_json(json.dumps(spec.get(field) or {}), strict=True))
        except ValidationError:
            continue


def _without(value: Any, locations: list[tuple[int | str, ...]]) -> Any:
    here = {location[0] for location in locations if len(location) == 1}
    below: dict[int | str, list[tuple[int | str, ...]]] = {}
    for location in locations:
        if len(location) > 1:
            below.setdefault(location[0], []).append(location[1:])
    if isinstance(value, Mapping):
        return {k: _without(v, below.get(k, [])) for k, v in value.items() if k not in here}
    if isinstance(value, list):
        return [_without(v, below.get(i, [])) for i, v in enumerate(value) if i not in here]
    return value


def _rules(job: RLJob) -> Iterator[Violation]:
    spec = job.spec
    yield from _name_rules(job)
    yield from _union_rules(spec)
    yield from _sampling_rules(spec.sampling)
    yield from _training_rules(spec)
    yield from _storage_rules(spec)
    yield from _failure_rules(spec)


def _job_name_rules(name: str) -> Iterator[Violation]:
    if len(name) > NAME_LENGTH or not LABEL.fullmatch(name):
        yield Violation(
            "metadata.name",
            _show(name),
            f"must be an RFC 1035 label of at most {NAME_LENGTH} characters: names of pods and hosts are made from it",
            "Use lower-case letters, digits and '-', beginning with a letter",
        )


def _name_rules(job: RLJob) -> Iterator[Violation]:
    yield from _job_name_rules(job.metadata.name)
    seen: set[str] = set()
    for index, pool in enumerate(job.spec.rollout_pools):
        path = f"spec.rolloutPools[{index}].name"
        if len(pool.name) > POOL_NAME_LENGTH or not LABEL.fullmatch(pool.name):
            yield Violation(
                path,
                _show(pool.name),
                f"must be an RFC 1035 label of at most {POOL_NAME_LENGTH} characters",
                "Use lower-case letters, digits and '-', beginning with a letter",
            )
        if pool.name == "trainer":
            yield Violation(path, _show(pool.name), "is the name of the trainer pool", "Choose another name")
        if pool.name in seen:
            yield Violation(path, _show(pool.name), "is used by another pool", "Give each pool a name of its own")
        seen.add(pool.name)
        if pool.replicas is not None and pool.min_replicas > max(pool.replicas, 1):
            yield Violation(
                f"spec.rolloutPools[{index}].minReplicas",
                str(pool.min_replicas),
                f"is more than replicas ({pool.replicas}): the job could never start",
                "Lower minReplicas or raise replicas",
            )


def _model_rules(model: Model) -> Iterator[Violation]:
    sources = [name for name in Model.model_fields if getattr(model, name) is not None]
    if len(sources) != 1:
        yield Violation(
            "spec.model",
            ", ".join(sources),
            f"has {len(sources)} sources, needs exactly one",
            "Set one of huggingFace, persistentVolumeClaim, path, random",
        )


def _union_rules(spec: RLJobSpec) -> Iterator[Violation]:
    yield from _model_rules(spec.model)
    for index, pool in enumerate(spec.rollout_pools):
        if pool.engine.vllm is not None and pool.engine.simulated is not None:
            yield Violation(
                f"spec.rolloutPools[{index}].engine",
                "",
                "names two engines",
                "Set one of vllm, simulated, or none for vllm",
            )
    weights = spec.storage.weights
    if weights.nats is not None and weights.persistent_volume_claim is not None:
        yield Violation(
            "spec.storage.weights", "", "names two places", "Set one of nats, persistentVolumeClaim, or none for nats"
        )


def _sampling_rules(sampling: Sampling) -> Iterator[Violation]:
    for name, neutral in NEUTRAL_SAMPLING.items():
        value = getattr(sampling, name)
        if value != neutral:
            wire = Sampling.model_fields[name].alias
            yield Violation(
                f"spec.sampling.{wire}",
                _show(value),
                "changes the distribution that tokens are sampled from in a way that the trainer cannot score",
                f"Leave {wire} out; temperature is the one sampling option that training supports",
            )
    if sampling.max_tokens >= sampling.max_trajectory_tokens:
        yield Violation(
            "spec.sampling.maxTokens",
            str(sampling.max_tokens),
            f"must be less than maxTrajectoryTokens ({sampling.max_trajectory_tokens}): the prompt needs room too",
            "Lower maxTokens or raise maxTrajectoryTokens",
        )


def _training_rules(spec: RLJobSpec) -> Iterator[Violation]:
    training, group = spec.training, spec.sampling.samples_per_task
    if group < 2:
        yield Violation(
            "spec.sampling.samplesPerTask",
            str(group),
            f"advantages of {training.advantage.estimator} compare the samples of a group: one sample has no advantage",
            "Use at least 2",
        )
    if training.mini_batches > training.tasks_per_step:
        yield Violation(
            "spec.training.miniBatches",
            str(training.mini_batches),
            f"is more than tasksPerStep ({training.tasks_per_step}): groups are never split",
            "Lower miniBatches or raise tasksPerStep",
        )
    if training.min_group_size is not None and training.min_group_size > group:
        yield Violation(
            "spec.training.minGroupSize",
            str(training.min_group_size),
            f"is more than samplesPerTask ({group}): every group would be dropped",
            "Lower minGroupSize or raise samplesPerTask",
        )
    if spec.correction.old_logprobs is OldLogprobs.RESIDENT and spec.staleness.max_versions > 0:
        yield Violation(
            "spec.correction.oldLogprobs",
            "Resident",
            f"has no old log-probability for a stale token, and staleness.maxVersions is {spec.staleness.max_versions}",
            "Use Snapshot, or set staleness.maxVersions to 0",
        )
    low, high = spec.correction.discrepancy.bounds()
    if low > high:
        yield Violation(
            "spec.correction.discrepancy.low", str(low), f"is more than high ({high})", "Swap or correct the bounds"
        )
    random = spec.model.random
    if random is None:
        return
    if len(set(random.alphabet)) != len(random.alphabet):
        yield Violation("spec.model.random.alphabet", _show(random.alphabet), "has a character twice", "Name each once")
    if random.key_value_heads is not None and random.heads % random.key_value_heads:
        yield Violation(
            "spec.model.random.keyValueHeads",
            str(random.key_value_heads),
            f"does not divide heads ({random.heads})",
            "Choose a divisor of heads",
        )
    if spec.sampling.max_trajectory_tokens > random.max_positions:
        yield Violation(
            "spec.sampling.maxTrajectoryTokens",
            str(spec.sampling.max_trajectory_tokens),
            f"is more than the model takes (model.random.maxPositions is {random.max_positions})",
            "Lower maxTrajectoryTokens or raise maxPositions",
        )


def _storage_rules(spec: RLJobSpec) -> Iterator[Violation]:
    largest = largest_trajectory_bytes(spec)
    messaging = spec.messaging
    if largest > messaging.max_payload_bytes:
        yield Violation(
            "spec.messaging.maxPayloadBytes",
            str(messaging.max_payload_bytes),
            f"is less than the largest trajectory ({largest} bytes for {spec.sampling.max_trajectory_tokens} tokens)",
            "Raise maxPayloadBytes or lower sampling.maxTrajectoryTokens",
        )
    steps = spec.staleness.max_versions + 1 + spec.storage.checkpoint.every_steps
    samples = spec.training.tasks_per_step * spec.sampling.samples_per_task
    needed = steps * samples * largest
    if messaging.trajectory_stream_bytes < needed:
        yield Violation(
            "spec.messaging.trajectoryStreamBytes",
            str(messaging.trajectory_stream_bytes),
            f"is less than {needed}: (maxVersions + 1 + checkpoint.everySteps) x tasksPerStep x samplesPerTask of the "
            "largest trajectory can wait between two checkpoints",
            "Raise trajectoryStreamBytes, or lower storage.checkpoint.everySteps",
        )
    if messaging.credentials_secret_ref is not None and messaging.url is None:
        yield Violation(
            "spec.messaging.credentialsSecretRef",
            messaging.credentials_secret_ref.name,
            "is for a server of your own, and no url is given",
            "Set messaging.url or leave credentialsSecretRef out",
        )


def _failure_rules(spec: RLJobSpec) -> Iterator[Violation]:
    pools = {"trainer", *(pool.name for pool in spec.rollout_pools)}
    for index, rule in enumerate(spec.failure_policy.rules):
        path = f"spec.failurePolicy.rules[{index}]"
        for unknown in sorted(set(rule.pools) - pools):
            yield Violation(
                f"{path}.pools", _show(unknown), "is not a pool of this job", f"Use {', '.join(sorted(pools))}"
            )
        if not rule.on_reasons and not rule.on_pod_conditions:
            yield Violation(path, rule.name, "matches nothing", "Set onReasons or onPodConditions")
