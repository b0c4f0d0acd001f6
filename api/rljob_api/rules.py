"""The rules over several fields. What a single field can say about itself (type, bounds, values) is in the models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from pydantic import BaseModel

from rljob_api.correction import Ewma, OldLogprobs
from rljob_api.failure_policy import FailurePolicy, FailureRule
from rljob_api.model_size import BYTES_PER_ELEMENT, number_of_parameters
from rljob_api.names import OLD_POLICY_POOL, TRAINER_POOL
from rljob_api.pools import Engine, RolloutPool
from rljob_api.rule import Finding, Rule, unless
from rljob_api.spec import (
    Messaging,
    Model,
    ObjectMeta,
    RandomModel,
    RLJob,
    RLJobSpec,
    Sampling,
    Training,
    WeightStorage,
)

JOB_NAME_CHARACTERS = 40
POOL_NAME_CHARACTERS = 16
RESERVED_POOLS = (TRAINER_POOL, OLD_POLICY_POOL)
"""What failure rules call the pools that have no name of their own; no rollout pool may be called so."""

BYTES_PER_TOKEN = 16
"""Token, turn, version and behavior log-probability of one token: four tensors of four bytes (trajectory.py)."""
HEADER_BYTES = 64 << 10
"""Allowance for a trajectory's header."""

_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LABEL_REMEDY = "Use lower-case letters, digits and `-`; start with a letter and end with a letter or a digit."


def largest_trajectory_bytes(sampling: Sampling) -> int:
    """Upper bound of one trajectory's message."""
    return BYTES_PER_TOKEN * sampling.max_trajectory_tokens + HEADER_BYTES


def needed_stream_bytes(spec: RLJobSpec) -> int:
    """Trajectories that may wait between two checkpoints: (η + 1 + everySteps) · B · G of the largest (design §3)."""
    steps = spec.staleness.max_versions + 1 + spec.storage.checkpoint.every_steps
    groups = steps * spec.training.tasks_per_step
    return groups * spec.sampling.samples_per_task * largest_trajectory_bytes(spec.sampling)


def needed_snapshot_bytes(spec: RLJobSpec) -> int | None:
    """Memory of a trainer process for maxVersions + 1 full copies of its share; None where no one knows beforehand.

    Full copies, although differences are kept where they are smaller: they are not always.
    """
    if spec.model.random is None:
        return None
    version = BYTES_PER_ELEMENT[spec.training.compute_type] * number_of_parameters(spec.model.random)
    processes = spec.trainer.replicas * spec.trainer.processes_per_replica
    return -(-(spec.staleness.max_versions + 1) * version // processes)


def _is_label(name: str, characters: int) -> bool:
    return len(name) <= characters and _LABEL.fullmatch(name) is not None


def _repeated(names: Iterable[str]) -> Iterator[tuple[int, str]]:
    seen: set[str] = set()
    for index, name in enumerate(names):
        if name in seen:
            yield index, name
        seen.add(name)


def _chosen(union: BaseModel) -> list[str]:
    fields = type(union).model_fields.items()
    return [str(field.alias) for name, field in fields if getattr(union, name) is not None]


# ------------------------------------------------------------------------------------------------- the whole object


def _schema_is_named(job: RLJob) -> Iterator[Finding]:
    for name, alias in (("api_version", "apiVersion"), ("kind", "kind")):
        yield from unless(name in job.model_fields_set, alias, None)


def _job_name(metadata: ObjectMeta) -> Iterator[Finding]:
    return unless(_is_label(metadata.name, JOB_NAME_CHARACTERS), "name", metadata.name)


# ----------------------------------------------------------------------------------------------------------- unions


def _one_model(model: Model) -> Iterator[Finding]:
    chosen = _chosen(model)
    return unless(len(chosen) == 1, "", chosen)


def _at_most_one(union: Engine | WeightStorage) -> Iterator[Finding]:
    chosen = _chosen(union)
    return unless(len(chosen) <= 1, "", chosen)


# ------------------------------------------------------------------------------------------------- model and sampling


def _head_groups(model: RandomModel) -> Iterator[Finding]:
    groups = model.key_value_heads
    return unless(groups is None or model.heads % groups == 0, "keyValueHeads", groups, f"heads is {model.heads}")


def _unique_alphabet(model: RandomModel) -> Iterator[Finding]:
    repeated = sorted({character for _, character in _repeated(model.alphabet)})
    return unless(not repeated, "alphabet", model.alphabet, f"repeated: {''.join(repeated)!r}")


def _turn_fits_trajectory(sampling: Sampling) -> Iterator[Finding]:
    longest = sampling.max_trajectory_tokens
    return unless(sampling.max_tokens < longest, "maxTokens", sampling.max_tokens, f"maxTrajectoryTokens is {longest}")


def _trajectory_fits_model(spec: RLJobSpec) -> Iterator[Finding]:
    if spec.model.random is not None:
        tokens, positions = spec.sampling.max_trajectory_tokens, spec.model.random.max_positions
        note = f"maxPositions is {positions}"
        yield from unless(tokens <= positions, "sampling.maxTrajectoryTokens", tokens, note)


def _trajectory_fits_message(spec: RLJobSpec) -> Iterator[Finding]:
    needed, limit = largest_trajectory_bytes(spec.sampling), spec.messaging.max_payload_bytes
    return unless(needed <= limit, "messaging.maxPayloadBytes", limit, f"{needed} needed")


def _stream_holds_a_checkpoint_interval(spec: RLJobSpec) -> Iterator[Finding]:
    needed, limit = needed_stream_bytes(spec), spec.messaging.trajectory_stream_bytes
    return unless(needed <= limit, "messaging.trajectoryStreamBytes", limit, f"{needed} needed")


def _unscorable(name: str, field: str, neutral: object) -> Rule:
    """A sampling option that changes the distribution in a way the training forward does not compute (design §6)."""

    def check(sampling: Sampling) -> Iterator[Finding]:
        value = getattr(sampling, name)
        return unless(value == neutral, field, value)

    kebab = name.replace("_", "-")
    return Rule(f"sampling-{kebab}", "spec.sampling", "the trainer cannot score it", f"Leave {field} out.", check)


# ---------------------------------------------------------------------------------------------------------- training


def _mini_batches_hold_groups(training: Training) -> Iterator[Finding]:
    tasks = training.tasks_per_step
    return unless(training.mini_batches <= tasks, "miniBatches", training.mini_batches, f"tasksPerStep is {tasks}")


def _group_size_can_be_reached(spec: RLJobSpec) -> Iterator[Finding]:
    fewest, samples = spec.training.min_group_size, spec.sampling.samples_per_task
    holds = fewest is None or fewest <= samples
    return unless(holds, "training.minGroupSize", fewest, f"samplesPerTask is {samples}")


def _group_has_siblings(spec: RLJobSpec) -> Iterator[Finding]:
    estimator, samples = spec.training.advantage.estimator, spec.sampling.samples_per_task
    return unless(samples >= 2, "sampling.samplesPerTask", samples, f"estimator is {estimator}")


def _resident_is_synchronous(spec: RLJobSpec) -> Iterator[Finding]:
    bound = spec.staleness.max_versions
    holds = spec.correction.old_logprobs is not OldLogprobs.RESIDENT or bound == 0
    return unless(holds, "correction.oldLogprobs", OldLogprobs.RESIDENT, f"staleness.maxVersions is {bound}")


# -------------------------------------------------------------------------------------------------------- correction


def _snapshots_fit_memory(spec: RLJobSpec) -> Iterator[Finding]:
    snapshots, needed = spec.correction.snapshots, needed_snapshot_bytes(spec)
    limit = snapshots.memory_bytes
    if spec.correction.old_logprobs is not OldLogprobs.SNAPSHOT or snapshots.spill or limit is None or needed is None:
        return
    note = f"{needed} needed, staleness.maxVersions is {spec.staleness.max_versions}"
    yield from unless(needed <= limit, "correction.snapshots.memoryBytes", limit, note)


def _dedicated_has_a_pool(spec: RLJobSpec) -> Iterator[Finding]:
    holds = spec.correction.old_logprobs is not OldLogprobs.DEDICATED or spec.old_policy_pool is not None
    return unless(holds, "oldPolicyPool", None, f"correction.oldLogprobs is {spec.correction.old_logprobs}")


def _old_policy_pool_is_used(spec: RLJobSpec) -> Iterator[Finding]:
    pool, route = spec.old_policy_pool, spec.correction.old_logprobs
    if pool is not None and route is not OldLogprobs.DEDICATED:
        given = pool.model_dump(mode="json", by_alias=True, exclude_unset=True)
        yield Finding("oldPolicyPool", given, f"correction.oldLogprobs is {route}")


def _decay_or_window(ewma: Ewma) -> Iterator[Finding]:
    holds = ewma.decay is None or ewma.window is None
    return unless(holds, "window", ewma.window, f"decay is {ewma.decay}")


# ------------------------------------------------------------------------------------------------ pools and failures


def _pool_name(pool: RolloutPool) -> Iterator[Finding]:
    return unless(_is_label(pool.name, POOL_NAME_CHARACTERS), "name", pool.name)


def _pool_name_is_free(pool: RolloutPool) -> Iterator[Finding]:
    return unless(pool.name not in RESERVED_POOLS, "name", pool.name)


def _unique_pool_names(spec: RLJobSpec) -> Iterator[Finding]:
    for index, name in _repeated(pool.name for pool in spec.rollout_pools):
        yield Finding(f"rolloutPools[{index}].name", name)


def _minimum_is_within_replicas(pool: RolloutPool) -> Iterator[Finding]:
    holds = pool.replicas is None or pool.min_replicas <= pool.replicas
    return unless(holds, "minReplicas", pool.min_replicas, f"replicas is {pool.replicas}")


def _failure_rules_name_pools(spec: RLJobSpec) -> Iterator[Finding]:
    known = {TRAINER_POOL, *(pool.name for pool in spec.rollout_pools)}
    if spec.old_policy_pool is not None:
        known.add(OLD_POLICY_POOL)
    for index, rule in enumerate(spec.failure_policy.rules):
        for position, name in enumerate(rule.pools):
            yield from unless(name in known, f"failurePolicy.rules[{index}].pools[{position}]", name)


def _unique_failure_rule_names(policy: FailurePolicy) -> Iterator[Finding]:
    for index, name in _repeated(rule.name for rule in policy.rules):
        yield Finding(f"rules[{index}].name", name)


def _failure_rule_has_a_criterion(rule: FailureRule) -> Iterator[Finding]:
    return unless(bool(rule.pools or rule.on_reasons or rule.on_pod_conditions), "", rule.name)


def _credentials_have_a_server(messaging: Messaging) -> Iterator[Finding]:
    reference = messaging.credentials_secret_ref
    return unless(
        reference is None or messaging.url is not None,
        "credentialsSecretRef",
        reference.model_dump() if reference else None,
    )


_SPEC = "spec"
_POOL = "spec.rolloutPools[*]"

RULES: tuple[Rule, ...] = (
    Rule(
        "schema-is-named",
        "",
        "is required",
        "Start the file with `apiVersion: rljob.dev/v1alpha1` and `kind: RLJob`.",
        _schema_is_named,
    ),
    Rule(
        "job-name",
        "metadata",
        f"must be an RFC 1035 label of at most {JOB_NAME_CHARACTERS} characters",
        _LABEL_REMEDY,
        _job_name,
    ),
    Rule(
        "one-model",
        "spec.model",
        "must have exactly one source",
        "Set one of huggingFace, persistentVolumeClaim, path and random.",
        _one_model,
    ),
    Rule(
        "one-engine",
        "spec.rolloutPools[*].engine",
        "must have at most one engine",
        "Set one of vllm and simulated, or neither for vLLM with its defaults.",
        _at_most_one,
    ),
    Rule(
        "one-weight-store",
        "spec.storage.weights",
        "must have at most one store",
        "Set one of nats and persistentVolumeClaim, or neither for the NATS object store.",
        _at_most_one,
    ),
    Rule(
        "random-head-groups",
        "spec.model.random",
        "must divide heads",
        "Choose a divisor of heads, or leave keyValueHeads out.",
        _head_groups,
    ),
    Rule(
        "random-alphabet",
        "spec.model.random",
        "must not repeat a character",
        "Name each character once: each becomes one token.",
        _unique_alphabet,
    ),
    _unscorable("top_p", "topP", 1.0),
    _unscorable("top_k", "topK", 0),
    _unscorable("min_p", "minP", 0.0),
    _unscorable("repetition_penalty", "repetitionPenalty", 1.0),
    _unscorable("presence_penalty", "presencePenalty", 0.0),
    _unscorable("frequency_penalty", "frequencyPenalty", 0.0),
    _unscorable("min_tokens", "minTokens", 0),
    _unscorable("logit_bias", "logitBias", {}),
    _unscorable("bad_words", "badWords", ()),
    _unscorable("guided_decoding", "guidedDecoding", None),
    Rule(
        "turn-fits-trajectory",
        "spec.sampling",
        "must be less than maxTrajectoryTokens",
        "Lower maxTokens or raise maxTrajectoryTokens: a trajectory holds the prompt too.",
        _turn_fits_trajectory,
    ),
    Rule(
        "trajectory-fits-model",
        _SPEC,
        "must be at most model.random.maxPositions",
        "Lower sampling.maxTrajectoryTokens or raise model.random.maxPositions.",
        _trajectory_fits_model,
    ),
    Rule(
        "trajectory-fits-message",
        _SPEC,
        f"is too small for the largest trajectory ({BYTES_PER_TOKEN} bytes a token + {HEADER_BYTES >> 10} KiB)",
        "Raise messaging.maxPayloadBytes or lower sampling.maxTrajectoryTokens.",
        _trajectory_fits_message,
    ),
    Rule(
        "stream-holds-a-checkpoint-interval",
        _SPEC,
        "is too small for the trajectories between two checkpoints: (staleness.maxVersions + 1 + "
        "storage.checkpoint.everySteps) * training.tasksPerStep * sampling.samplesPerTask of the largest",
        "Raise messaging.trajectoryStreamBytes, or lower storage.checkpoint.everySteps or "
        "sampling.maxTrajectoryTokens.",
        _stream_holds_a_checkpoint_interval,
    ),
    Rule(
        "mini-batches-hold-groups",
        "spec.training",
        "must be at most tasksPerStep",
        "Lower miniBatches or raise tasksPerStep: groups are never split.",
        _mini_batches_hold_groups,
    ),
    Rule(
        "group-size-can-be-reached",
        _SPEC,
        "must be at most sampling.samplesPerTask",
        "Lower training.minGroupSize or raise sampling.samplesPerTask.",
        _group_size_can_be_reached,
    ),
    Rule(
        "group-has-siblings",
        _SPEC,
        "must be at least 2: an advantage compares the samples of one task",
        "Raise sampling.samplesPerTask.",
        _group_has_siblings,
    ),
    Rule(
        "resident-is-synchronous",
        _SPEC,
        "needs staleness.maxVersions 0: the trainer no longer holds an older version",
        "Use Snapshot, or set staleness.maxVersions to 0.",
        _resident_is_synchronous,
    ),
    Rule(
        "snapshots-fit-memory",
        _SPEC,
        "is too small for staleness.maxVersions + 1 full copies of a trainer process's share of the model "
        "(4 bytes a parameter with training.computeType Float32, 2 with BFloat16; trainer.replicas * "
        "trainer.processesPerReplica shares)",
        "Raise correction.snapshots.memoryBytes, set correction.snapshots.spill, lower staleness.maxVersions, or train in "
        "BFloat16. A job that exists cannot change its correction: keep staleness.maxVersions at what the memory holds, "
        "or make a new RLJob with more.",
        _snapshots_fit_memory,
    ),
    Rule(
        "dedicated-has-a-pool",
        _SPEC,
        "is required by correction.oldLogprobs Dedicated: its workers are what scores the tokens",
        "Add `oldPolicyPool: {replicas: 1}`, or choose another route, such as Snapshot.",
        _dedicated_has_a_pool,
    ),
    Rule(
        "old-policy-pool-is-used",
        _SPEC,
        "has nothing to do: only correction.oldLogprobs Dedicated asks its workers",
        "Leave oldPolicyPool out, or set correction.oldLogprobs to Dedicated.",
        _old_policy_pool_is_used,
    ),
    Rule(
        "ewma-decay-or-window",
        "spec.correction.ewma",
        "may not be given beside decay: each alone fixes the decay",
        "Set decay or window, or neither for a decay that follows the measured staleness.",
        _decay_or_window,
    ),
    Rule(
        "pool-name",
        _POOL,
        f"must be an RFC 1035 label of at most {POOL_NAME_CHARACTERS} characters",
        _LABEL_REMEDY,
        _pool_name,
    ),
    Rule(
        "pool-name-is-free",
        _POOL,
        "is the name of the trainer pool, or of the old-policy pool",
        "Choose another name.",
        _pool_name_is_free,
    ),
    Rule(
        "unique-pool-names",
        _SPEC,
        "is the name of another pool",
        "Give each pool its own name.",
        _unique_pool_names,
    ),
    Rule(
        "minimum-is-within-replicas",
        _POOL,
        "must be at most replicas",
        "Lower minReplicas or raise replicas.",
        _minimum_is_within_replicas,
    ),
    Rule(
        "failure-rules-name-pools",
        _SPEC,
        "names no pool of the job",
        f"Name `{TRAINER_POOL}`, a rollout pool, or `{OLD_POLICY_POOL}` where the job has an oldPolicyPool.",
        _failure_rules_name_pools,
    ),
    Rule(
        "unique-failure-rule-names",
        "spec.failurePolicy",
        "repeats the name of another rule",
        "Give each rule its own name.",
        _unique_failure_rule_names,
    ),
    Rule(
        "failure-rule-has-a-criterion",
        "spec.failurePolicy.rules[*]",
        "matches every failure of every pool",
        "Add pools, onReasons or onPodConditions; maxRestarts alone already says what happens by default.",
        _failure_rule_has_a_criterion,
    ),
    Rule(
        "credentials-have-a-server",
        "spec.messaging",
        "needs messaging.url: the operator makes the credentials of its own server",
        "Set messaging.url or leave credentialsSecretRef out.",
        _credentials_have_a_server,
    ),
)
