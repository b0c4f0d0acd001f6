"""The rules as the apiserver checks them: expressions in the Common Expression Language, by the id of the rule.

Text and scope are those of rules.py and cluster_rules.py, so that `rljob validate` and the apiserver say the same. The
expressions may read every field that has a default (the apiserver fills it in before it looks) and ask `has` for the
others; in an object whose own default is `{}` they ask for all, since the apiserver also tries its rules on that default
as it stands. Each has a cost that the apiserver bounds from the longest strings and lists of the schema.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rljob_api.model_size import BYTES_PER_ELEMENT, SPECIAL_TOKENS, VOCABULARY_MULTIPLE
from rljob_api.names import OLD_POLICY_POOL, TRAINER_POOL
from rljob_api.rules import BYTES_PER_TOKEN, HEADER_BYTES, JOB_NAME_CHARACTERS, POOL_NAME_CHARACTERS, RESERVED_POOLS
from rljob_api.spec import ComputeType


@dataclass(frozen=True, slots=True)
class Cel:
    """One rule in CEL; `self` is the object at the rule's scope."""

    expression: str
    field: str = ""
    """The field that the apiserver names, below the scope; empty is the scope itself."""
    scope: str | None = None
    """Where the expression is placed when that is not the rule's scope."""
    reason: str = "FieldValueInvalid"

    def placed(self, message: str) -> dict[str, Any]:
        """An item of `x-kubernetes-validations`."""
        path = {"fieldPath": f".{self.field}"} if self.field else {}
        return {"rule": self.expression, "message": message, "reason": self.reason, **path}


def _label(name: str, characters: int) -> str:
    return f"{name}.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$') && size({name}) <= {characters}"


def _neutral(field: str, value: str) -> Cel:
    return Cel(f"!has(self.{field}) || self.{field} == {value}", field)


def _empty(field: str) -> Cel:
    return Cel(f"!has(self.{field}) || size(self.{field}) == 0", field)


_LARGEST_TRAJECTORY = f"({BYTES_PER_TOKEN} * self.sampling.maxTrajectoryTokens + {HEADER_BYTES})"


def _parameters(model: str) -> str:
    """`model_size.number_of_parameters`, in floating point: exact, for a model has less than 2^53."""
    hidden, head = f"double({model}.hiddenSize)", f"double({model}.headDim)"
    groups = f"(has({model}.keyValueHeads) ? {model}.keyValueHeads : {model}.heads)"
    filled = f"(size({model}.alphabet) + {SPECIAL_TOKENS + VOCABULARY_MULTIPLE - 1}) / {VOCABULARY_MULTIPLE}"
    attention = f"2.0 * {hidden} * {head} * (double({model}.heads) + double{groups})"
    feed_forward = f"3.0 * {hidden} * double({model}.intermediateSize)"
    norms = f"2.0 * {hidden} + ({model}.architecture == 'Qwen3' ? 2.0 * {head} : 0.0)"
    embeddings = f"({model}.tiedEmbeddings ? 1.0 : 2.0) * double({filled} * {VOCABULARY_MULTIPLE}) * {hidden}"
    return f"({embeddings} + double({model}.layers) * ({attention} + {feed_forward} + {norms}) + {hidden})"


def _bytes_per_element(compute_type: str) -> str:
    single, half = (float(BYTES_PER_ELEMENT[kind]) for kind in (ComputeType.FLOAT32, ComputeType.BFLOAT16))
    return f"({compute_type} == '{ComputeType.FLOAT32}' ? {single} : {half})"


CEL: dict[str, Cel] = {
    # The root sees no other metadata than the name.
    "job-name": Cel(_label("self.metadata.name", JOB_NAME_CHARACTERS), "metadata.name", scope=""),
    "one-model": Cel(
        "[has(self.huggingFace), has(self.persistentVolumeClaim), has(self.path), has(self.random)]"
        ".exists_one(given, given)"
    ),
    "one-engine": Cel("!has(self.vllm) || !has(self.simulated)"),
    "one-weight-store": Cel("!has(self.nats) || !has(self.persistentVolumeClaim)"),
    "random-head-groups": Cel(
        "!has(self.keyValueHeads) || self.keyValueHeads < 1 || self.heads % self.keyValueHeads == 0", "keyValueHeads"
    ),
    "random-alphabet": Cel(
        "self.alphabet.split('').all(c, self.alphabet.indexOf(c) == self.alphabet.lastIndexOf(c))", "alphabet"
    ),
    "sampling-top-p": _neutral("topP", "1.0"),
    "sampling-top-k": _neutral("topK", "0"),
    "sampling-min-p": _neutral("minP", "0.0"),
    "sampling-repetition-penalty": _neutral("repetitionPenalty", "1.0"),
    "sampling-presence-penalty": _neutral("presencePenalty", "0.0"),
    "sampling-frequency-penalty": _neutral("frequencyPenalty", "0.0"),
    "sampling-min-tokens": _neutral("minTokens", "0"),
    "sampling-logit-bias": _empty("logitBias"),
    "sampling-bad-words": _empty("badWords"),
    "sampling-guided-decoding": Cel("!has(self.guidedDecoding)", "guidedDecoding"),
    "turn-fits-trajectory": Cel(
        "!has(self.maxTokens) || !has(self.maxTrajectoryTokens) || self.maxTokens < self.maxTrajectoryTokens",
        "maxTokens",
    ),
    "trajectory-fits-model": Cel(
        "!has(self.model.random) || self.sampling.maxTrajectoryTokens <= self.model.random.maxPositions",
        "sampling.maxTrajectoryTokens",
    ),
    "trajectory-fits-message": Cel(
        f"{_LARGEST_TRAJECTORY} <= self.messaging.maxPayloadBytes", "messaging.maxPayloadBytes"
    ),
    # In floating point: the product passes 2^63, where integers are an error. Below 2^53 it is exact, and the field's
    # own bound of 2^50 is far below that.
    "stream-holds-a-checkpoint-interval": Cel(
        "double(self.staleness.maxVersions + 1 + self.storage.checkpoint.everySteps)"
        " * double(self.training.tasksPerStep) * double(self.sampling.samplesPerTask)"
        f" * double{_LARGEST_TRAJECTORY} <= double(self.messaging.trajectoryStreamBytes)",
        "messaging.trajectoryStreamBytes",
    ),
    "mini-batches-hold-groups": Cel("self.miniBatches <= self.tasksPerStep", "miniBatches"),
    "group-size-can-be-reached": Cel(
        "!has(self.training.minGroupSize) || self.training.minGroupSize <= self.sampling.samplesPerTask",
        "training.minGroupSize",
    ),
    "group-has-siblings": Cel("self.sampling.samplesPerTask >= 2", "sampling.samplesPerTask"),
    "resident-is-synchronous": Cel(
        "self.correction.oldLogprobs != 'Resident' || self.staleness.maxVersions == 0", "correction.oldLogprobs"
    ),
    "snapshots-fit-memory": Cel(
        "self.correction.oldLogprobs != 'Snapshot' || self.correction.snapshots.spill"
        " || !has(self.correction.snapshots.memoryBytes) || !has(self.model.random)"
        f" || double(self.staleness.maxVersions + 1) * {_bytes_per_element('self.training.computeType')}"
        f" * {_parameters('self.model.random')} <= double(self.correction.snapshots.memoryBytes)"
        " * double(self.trainer.replicas) * double(self.trainer.processesPerReplica)",
        "correction.snapshots.memoryBytes",
    ),
    "dedicated-has-a-pool": Cel(
        "self.correction.oldLogprobs != 'Dedicated' || has(self.oldPolicyPool)",
        "oldPolicyPool",
        reason="FieldValueRequired",
    ),
    "old-policy-pool-is-used": Cel(
        "!has(self.oldPolicyPool) || self.correction.oldLogprobs == 'Dedicated'", "oldPolicyPool"
    ),
    "ewma-decay-or-window": Cel("!has(self.decay) || !has(self.window)", "window"),
    "pool-name": Cel(_label("self.name", POOL_NAME_CHARACTERS), "name"),
    "pool-name-is-free": Cel(" && ".join(f"self.name != '{name}'" for name in RESERVED_POOLS), "name"),
    "minimum-is-within-replicas": Cel("!has(self.replicas) || self.minReplicas <= self.replicas", "minReplicas"),
    "failure-rules-name-pools": Cel(
        "!has(self.failurePolicy.rules) || self.failurePolicy.rules.all(rule, !has(rule.pools) || rule.pools.all(name, "
        f"name == '{TRAINER_POOL}' || name == '{OLD_POLICY_POOL}' && has(self.oldPolicyPool)"
        " || self.rolloutPools.exists(pool, pool.name == name)))",
        "failurePolicy.rules",
    ),
    "unique-failure-rule-names": Cel(
        "!has(self.rules) || self.rules.all(one, self.rules.exists_one(other, other.name == one.name))", "rules"
    ),
    "failure-rule-has-a-criterion": Cel(
        " || ".join(
            f"has(self.{field}) && size(self.{field}) > 0" for field in ("pools", "onReasons", "onPodConditions")
        )
    ),
    "credentials-have-a-server": Cel("!has(self.credentialsSecretRef) || has(self.url)", "credentialsSecretRef"),
    "restarts-keep-checkpoints": Cel(
        "self.failurePolicy.maxRestarts == 0 || has(self.storage.checkpoint.persistentVolumeClaim)",
        "storage.checkpoint.persistentVolumeClaim",
        reason="FieldValueRequired",
    ),
}

_TEMPLATE = (
    "Pod templates keep unknown fields, which no expression can read; the operator refuses them as InvalidTemplate."
)
_LIST_MAP = "The schema holds it: the list is a map by name."

WITHOUT_CEL: dict[str, str] = {
    "schema-is-named": "The apiserver finds the schema by these fields.",
    "unique-pool-names": _LIST_MAP,
    "trainer-template-owned-fields": _TEMPLATE,
    "trainer-template-containers": "The schema holds it.",
    "trainer-template-container-names": f"{_LIST_MAP} Init containers: {_TEMPLATE}",
    "rollout-template-owned-fields": _TEMPLATE,
    "rollout-template-containers": "The schema holds it.",
    "rollout-template-container-names": f"{_LIST_MAP} Init containers: {_TEMPLATE}",
    "old-policy-template-owned-fields": _TEMPLATE,
    "old-policy-template-containers": "The schema holds it.",
    "old-policy-template-container-names": f"{_LIST_MAP} Init containers: {_TEMPLATE}",
}
"""Rules that the apiserver has in another form than an expression, or not at all, and why."""

IMMUTABLE = ("model", "environment", "correction", "storage", "messaging")
"""Fields of the spec that no change may touch: what is trained, what it is trained on, and where its state lives."""


def unchangeable(field: str) -> dict[str, Any]:
    """The rule on the spec that refuses a change of one field of it: to another value, from unset, and to unset.

    It sits on the parent: a rule on the field itself is not asked when the field comes or goes.
    """
    expression = f"has(self.{field}) == has(oldSelf.{field}) && (!has(self.{field}) || self.{field} == oldSelf.{field})"
    message = (
        "cannot be changed: checkpoints and weight versions of the job belong to its first value. Put it back, or make "
        "a new RLJob under another name."
    )
    return Cel(expression, field).placed(message)
