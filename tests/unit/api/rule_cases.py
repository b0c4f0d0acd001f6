"""Each rule over several fields, as data: a case that it refuses, with the exact words, and one that it accepts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.unit.api.documents import REMOVE

RANDOM = {"spec.model": {"random": {}}, "spec.sampling.maxTrajectoryTokens": 512}
SNAPSHOT = RANDOM | {"spec.correction.oldLogprobs": "Snapshot"}
MEMORY = "spec.correction.snapshots.memoryBytes"
DEDICATED = {"spec.correction.oldLogprobs": "Dedicated", "spec.oldPolicyPool": {}}
LABEL_REMEDY = "Use lower-case letters, digits and `-`; start with a letter and end with a letter or a digit."
NAME_REMEDY = "Start the file with `apiVersion: rljob.dev/v1alpha1` and `kind: RLJob`."
POOLS = "spec.rolloutPools"
TEMPLATE = "spec.trainer.template.spec"
OLD_POLICY = "spec.oldPolicyPool.template.spec"
OWNED = (
    "belongs to the operator (in the container `{}`: command, args, livenessProbe, readinessProbe, startupProbe, "
    "RLJOB_* environment, /dev/shm; in the pod: restartPolicy)"
)
TOO_SMALL = (
    "is too small for staleness.maxVersions + 1 full copies of a trainer process's share of the model (4 bytes a "
    "parameter with training.computeType Float32, 2 with BFloat16; trainer.replicas * trainer.processesPerReplica shares)"
)
MORE_MEMORY = (
    "Raise correction.snapshots.memoryBytes, set correction.snapshots.spill, lower staleness.maxVersions, or train in "
    "BFloat16. A job that exists cannot change its correction: keep staleness.maxVersions at what the memory holds, or "
    "make a new RLJob with more."
)
CONTAINERS = "must be a list of at most 64 containers, each with a name of at most 63 characters"


QWEN3 = {
    "architecture": "Qwen3",
    "alphabet": "".join(chr(48 + index) for index in range(75)),
    "heads": 4,
    "keyValueHeads": 2,
    "tiedEmbeddings": True,
}
OLD_POLICY_RULES = [{"name": "r", "pools": ["old-policy"], "action": "RestartPool"}]


@dataclass(frozen=True)
class Case:
    rule: str
    refused: dict[str, Any]
    path: str
    value: str
    reason: str
    remedy: str
    accepted: dict[str, Any]


def unscorable(field: str, value: object, shown: str, neutral: object, rule: str) -> Case:
    path = f"spec.sampling.{field}"
    remedy = f"Leave {field} out."
    return Case(rule, {path: value}, path, shown, "the trainer cannot score it", remedy, {path: neutral})


CASES = (
    Case("schema-is-named", {"kind": REMOVE}, "kind", "", "is required", NAME_REMEDY, {}),
    Case("schema-is-named", {"apiVersion": REMOVE}, "apiVersion", "", "is required", NAME_REMEDY, {}),
    Case(
        "job-name",
        {"metadata.name": "a" * 41},
        "metadata.name",
        f'"{"a" * 41}"',
        "must be an RFC 1035 label of at most 40 characters",
        LABEL_REMEDY,
        {"metadata.name": "a" * 40},
    ),
    Case(
        "job-name",
        {"metadata.name": "1job"},
        "metadata.name",
        '"1job"',
        "must be an RFC 1035 label of at most 40 characters",
        LABEL_REMEDY,
        {"metadata.name": "j1-b"},
    ),
    Case(
        "one-model",
        {"spec.model": {"path": "a", "random": {}}, "spec.sampling.maxTrajectoryTokens": 512},
        "spec.model",
        '["path", "random"]',
        "must have exactly one source",
        "Set one of huggingFace, persistentVolumeClaim, path and random.",
        RANDOM,
    ),
    Case(
        "one-model",
        {"spec.model": {}},
        "spec.model",
        "[]",
        "must have exactly one source",
        "Set one of huggingFace, persistentVolumeClaim, path and random.",
        {"spec.model": {"persistentVolumeClaim": {"claimName": "models"}}},
    ),
    Case(
        "one-engine",
        {f"{POOLS}.0.engine": {"vllm": {}, "simulated": {}}},
        "spec.rolloutPools[0].engine",
        '["vllm", "simulated"]',
        "must have at most one engine",
        "Set one of vllm and simulated, or neither for vLLM with its defaults.",
        {f"{POOLS}.0.engine": {"simulated": {}}},
    ),
    Case(
        "one-weight-store",
        {"spec.storage.weights": {"nats": {}, "persistentVolumeClaim": {"claimName": "w"}}},
        "spec.storage.weights",
        '["nats", "persistentVolumeClaim"]',
        "must have at most one store",
        "Set one of nats and persistentVolumeClaim, or neither for the NATS object store.",
        {"spec.storage.weights": {"nats": {}}},
    ),
    Case(
        "random-head-groups",
        RANDOM | {"spec.model": {"random": {"heads": 4, "keyValueHeads": 3}}},
        "spec.model.random.keyValueHeads",
        "3; heads is 4",
        "must divide heads",
        "Choose a divisor of heads, or leave keyValueHeads out.",
        RANDOM | {"spec.model": {"random": {"heads": 4, "keyValueHeads": 2}}},
    ),
    Case(
        "random-alphabet",
        RANDOM | {"spec.model": {"random": {"alphabet": "abca"}}},
        "spec.model.random.alphabet",
        "\"abca\"; repeated: 'a'",
        "must not repeat a character",
        "Name each character once: each becomes one token.",
        RANDOM | {"spec.model": {"random": {"alphabet": "abc"}}},
    ),
    unscorable("topP", 0.9, "0.9", 1, "sampling-top-p"),
    unscorable("topK", 50, "50", 0, "sampling-top-k"),
    unscorable("minP", 0.1, "0.1", 0.0, "sampling-min-p"),
    unscorable("repetitionPenalty", 1.1, "1.1", 1.0, "sampling-repetition-penalty"),
    unscorable("presencePenalty", -1, "-1.0", 0, "sampling-presence-penalty"),
    unscorable("frequencyPenalty", 0.5, "0.5", 0, "sampling-frequency-penalty"),
    unscorable("minTokens", 1, "1", 0, "sampling-min-tokens"),
    unscorable("logitBias", {"50": 1}, '{"50": 1.0}', {}, "sampling-logit-bias"),
    unscorable("badWords", ["x"], '["x"]', [], "sampling-bad-words"),
    unscorable("guidedDecoding", {"regex": "a"}, '{"regex": "a"}', None, "sampling-guided-decoding"),
    Case(
        "turn-fits-trajectory",
        {"spec.sampling.maxTrajectoryTokens": 256},
        "spec.sampling.maxTokens",
        "256, the default; maxTrajectoryTokens is 256",
        "must be less than maxTrajectoryTokens",
        "Lower maxTokens or raise maxTrajectoryTokens: a trajectory holds the prompt too.",
        {"spec.sampling.maxTrajectoryTokens": 257},
    ),
    Case(
        "trajectory-fits-model",
        RANDOM | {"spec.sampling.maxTrajectoryTokens": 513},
        "spec.sampling.maxTrajectoryTokens",
        "513; maxPositions is 512",
        "must be at most model.random.maxPositions",
        "Lower sampling.maxTrajectoryTokens or raise model.random.maxPositions.",
        RANDOM,
    ),
    Case(
        "trajectory-fits-message",
        {"spec.messaging.maxPayloadBytes": 1 << 20, "spec.sampling.maxTrajectoryTokens": 61441},
        "spec.messaging.maxPayloadBytes",
        "1048576; 1048592 needed",
        "is too small for the largest trajectory (16 bytes a token + 64 KiB)",
        "Raise messaging.maxPayloadBytes or lower sampling.maxTrajectoryTokens.",
        {"spec.messaging.maxPayloadBytes": 1 << 20, "spec.sampling.maxTrajectoryTokens": 61440},
    ),
    Case(
        # (4 + 1 + 20) steps of 4 tasks of 8 samples of 131072 bytes
        "stream-holds-a-checkpoint-interval",
        {"spec.messaging.trajectoryStreamBytes": 25 * 4 * 8 * 131072 - 1},
        "spec.messaging.trajectoryStreamBytes",
        "104857599; 104857600 needed",
        "is too small for the trajectories between two checkpoints: (staleness.maxVersions + 1 + "
        "storage.checkpoint.everySteps) * training.tasksPerStep * sampling.samplesPerTask of the largest",
        "Raise messaging.trajectoryStreamBytes, or lower storage.checkpoint.everySteps or sampling.maxTrajectoryTokens.",
        {"spec.messaging.trajectoryStreamBytes": 25 * 4 * 8 * 131072},
    ),
    Case(
        "mini-batches-hold-groups",
        {"spec.training.miniBatches": 5},
        "spec.training.miniBatches",
        "5; tasksPerStep is 4",
        "must be at most tasksPerStep",
        "Lower miniBatches or raise tasksPerStep: groups are never split.",
        {"spec.training.miniBatches": 4},
    ),
    Case(
        "group-size-can-be-reached",
        {"spec.training.minGroupSize": 9},
        "spec.training.minGroupSize",
        "9; samplesPerTask is 8",
        "must be at most sampling.samplesPerTask",
        "Lower training.minGroupSize or raise sampling.samplesPerTask.",
        {"spec.training.minGroupSize": 8},
    ),
    Case(
        "group-has-siblings",
        {"spec.sampling.samplesPerTask": 1},
        "spec.sampling.samplesPerTask",
        "1; estimator is GRPO",
        "must be at least 2: an advantage compares the samples of one task",
        "Raise sampling.samplesPerTask.",
        {"spec.sampling.samplesPerTask": 2},
    ),
    Case(
        "group-has-siblings",
        {"spec.sampling.samplesPerTask": 1, "spec.training.advantage.estimator": "RLOO"},
        "spec.sampling.samplesPerTask",
        "1; estimator is RLOO",
        "must be at least 2: an advantage compares the samples of one task",
        "Raise sampling.samplesPerTask.",
        {"spec.sampling.samplesPerTask": 2, "spec.training.advantage.estimator": "RLOO"},
    ),
    Case(
        "resident-is-synchronous",
        {"spec.correction.oldLogprobs": "Resident", "spec.staleness.maxVersions": 1},
        "spec.correction.oldLogprobs",
        '"Resident"; staleness.maxVersions is 1',
        "needs staleness.maxVersions 0: the trainer no longer holds an older version",
        "Use Snapshot, or set staleness.maxVersions to 0.",
        {"spec.correction.oldLogprobs": "Resident", "spec.staleness.maxVersions": 0},
    ),
    # The random model with defaults has 84288 parameters; in BFloat16 five versions of it are 842880 bytes.
    Case(
        "snapshots-fit-memory",
        SNAPSHOT | {MEMORY: 842879},
        MEMORY,
        "842879; 842880 needed, staleness.maxVersions is 4",
        TOO_SMALL,
        MORE_MEMORY,
        SNAPSHOT | {MEMORY: 842880},
    ),
    Case(  # one more version: as where the bound of a running job is raised
        "snapshots-fit-memory",
        SNAPSHOT | {MEMORY: 842880, "spec.staleness.maxVersions": 5},
        MEMORY,
        "842880; 1011456 needed, staleness.maxVersions is 5",
        TOO_SMALL,
        MORE_MEMORY,
        SNAPSHOT | {MEMORY: 842880, "spec.staleness.maxVersions": 5, "spec.correction.snapshots.spill": True},
    ),
    Case(  # twice as many bytes, over six processes: 1685760 / 6
        "snapshots-fit-memory",
        SNAPSHOT
        | {MEMORY: 280959, "spec.training.computeType": "Float32", "spec.trainer.replicas": 3}
        | {"spec.trainer.processesPerReplica": 2},
        MEMORY,
        "280959; 280960 needed, staleness.maxVersions is 4",
        TOO_SMALL,
        MORE_MEMORY,
        SNAPSHOT
        | {MEMORY: 280960, "spec.training.computeType": "Float32", "spec.trainer.replicas": 3}
        | {"spec.trainer.processesPerReplica": 2},
    ),
    Case(  # Qwen3, tied, two key/value heads of four: 78 tokens filled up to 80, 103872 parameters
        "snapshots-fit-memory",
        SNAPSHOT | {"spec.model.random": QWEN3} | {MEMORY: 1038719, "spec.correction.fallback": "Ewma"},
        MEMORY,
        "1038719; 1038720 needed, staleness.maxVersions is 4",
        TOO_SMALL,
        MORE_MEMORY,
        SNAPSHOT | {"spec.model.random": QWEN3} | {MEMORY: 1038720},
    ),
    Case(  # another route keeps no old version
        "snapshots-fit-memory",
        SNAPSHOT | {MEMORY: 0},
        MEMORY,
        "0; 842880 needed, staleness.maxVersions is 4",
        TOO_SMALL,
        MORE_MEMORY,
        SNAPSHOT | {MEMORY: 0, "spec.correction.oldLogprobs": "Interruption"},
    ),
    Case(  # how large another model is, only the trainer knows
        "snapshots-fit-memory",
        SNAPSHOT | {MEMORY: 1},
        MEMORY,
        "1; 842880 needed, staleness.maxVersions is 4",
        TOO_SMALL,
        MORE_MEMORY,
        {MEMORY: 1},
    ),
    Case(
        "dedicated-has-a-pool",
        {"spec.correction.oldLogprobs": "Dedicated"},
        "spec.oldPolicyPool",
        "nothing; correction.oldLogprobs is Dedicated",
        "is required by correction.oldLogprobs Dedicated: its workers are what scores the tokens",
        "Add `oldPolicyPool: {replicas: 1}`, or choose another route, such as Snapshot.",
        DEDICATED,
    ),
    Case(
        "old-policy-pool-is-used",
        {"spec.oldPolicyPool": {"replicas": 2}},
        "spec.oldPolicyPool",
        '{"replicas": 2}; correction.oldLogprobs is Snapshot',
        "has nothing to do: only correction.oldLogprobs Dedicated asks its workers",
        "Leave oldPolicyPool out, or set correction.oldLogprobs to Dedicated.",
        DEDICATED | {"spec.oldPolicyPool": {"replicas": 2}},
    ),
    Case(
        "ewma-decay-or-window",
        {"spec.correction.oldLogprobs": "Ewma", "spec.correction.ewma": {"decay": 0.5, "window": 4}},
        "spec.correction.ewma.window",
        "4; decay is 0.5",
        "may not be given beside decay: each alone fixes the decay",
        "Set decay or window, or neither for a decay that follows the measured staleness.",
        # A setting without an effect is not refused: the route is Snapshot, the fallback Drop.
        {"spec.correction.ewma": {"decay": 0.5}, "spec.correction.eager": {"enabled": False, "prefixTokens": 0}},
    ),
    Case(
        "pool-name",
        {f"{POOLS}.0.name": "a" * 17},
        "spec.rolloutPools[0].name",
        f'"{"a" * 17}"',
        "must be an RFC 1035 label of at most 16 characters",
        LABEL_REMEDY,
        {f"{POOLS}.0.name": "a" * 16},
    ),
    Case(
        "pool-name",
        {f"{POOLS}.0.name": "pool-"},
        "spec.rolloutPools[0].name",
        '"pool-"',
        "must be an RFC 1035 label of at most 16 characters",
        LABEL_REMEDY,
        {f"{POOLS}.0.name": "pool-0"},
    ),
    Case(
        "pool-name-is-free",
        {f"{POOLS}.0.name": "trainer"},
        "spec.rolloutPools[0].name",
        '"trainer"',
        "is the name of the trainer pool, or of the old-policy pool",
        "Choose another name.",
        {f"{POOLS}.0.name": "trainers"},
    ),
    Case(
        "pool-name-is-free",
        {f"{POOLS}.0.name": "old-policy"},
        "spec.rolloutPools[0].name",
        '"old-policy"',
        "is the name of the trainer pool, or of the old-policy pool",
        "Choose another name.",
        {f"{POOLS}.0.name": "old-policy-2"},
    ),
    Case(
        "unique-pool-names",
        {POOLS: [{"name": "a"}, {"name": "b"}, {"name": "a"}]},
        "spec.rolloutPools[2].name",
        '"a"',
        "is the name of another pool",
        "Give each pool its own name.",
        {POOLS: [{"name": "a"}, {"name": "b"}, {"name": "c"}]},
    ),
    Case(
        "minimum-is-within-replicas",
        {f"{POOLS}.0.minReplicas": 2},
        "spec.rolloutPools[0].minReplicas",
        "2; replicas is 1",
        "must be at most replicas",
        "Lower minReplicas or raise replicas.",
        {f"{POOLS}.0": {"name": "main", "minReplicas": 2}},  # replicas unset: an autoscaler owns the number
    ),
    Case(
        "failure-rules-name-pools",
        {"spec.failurePolicy.rules": [{"name": "r", "pools": ["trainer", "mian"], "action": "FailJob"}]},
        "spec.failurePolicy.rules[0].pools[1]",
        '"mian"',
        "names no pool of the job",
        "Name `trainer`, a rollout pool, or `old-policy` where the job has an oldPolicyPool.",
        {"spec.failurePolicy.rules": [{"name": "r", "pools": ["trainer", "main"], "action": "FailJob"}]},
    ),
    Case(
        "failure-rules-name-pools",
        {"spec.failurePolicy.rules": OLD_POLICY_RULES},
        "spec.failurePolicy.rules[0].pools[0]",
        '"old-policy"',
        "names no pool of the job",
        "Name `trainer`, a rollout pool, or `old-policy` where the job has an oldPolicyPool.",
        DEDICATED | {"spec.failurePolicy.rules": OLD_POLICY_RULES},
    ),
    Case(
        "unique-failure-rule-names",
        {"spec.failurePolicy.rules": [{"name": "r", "onReasons": ["X"], "action": "Ignore"}] * 2},
        "spec.failurePolicy.rules[1].name",
        '"r"',
        "repeats the name of another rule",
        "Give each rule its own name.",
        {"spec.failurePolicy.rules": [{"name": n, "onReasons": ["X"], "action": "Ignore"} for n in "rs"]},
    ),
    Case(
        "failure-rule-has-a-criterion",
        {"spec.failurePolicy.rules": [{"name": "all", "action": "Ignore"}]},
        "spec.failurePolicy.rules[0]",
        '"all"',
        "matches every failure of every pool",
        "Add pools, onReasons or onPodConditions; maxRestarts alone already says what happens by default.",
        {
            "spec.failurePolicy.rules": [
                {"name": "evicted", "onPodConditions": [{"type": "DisruptionTarget"}], "action": "Ignore"}
            ]
        },
    ),
    Case(
        "credentials-have-a-server",
        {"spec.messaging.credentialsSecretRef": {"name": "nats"}},
        "spec.messaging.credentialsSecretRef",
        '{"name": "nats"}',
        "needs messaging.url: the operator makes the credentials of its own server",
        "Set messaging.url or leave credentialsSecretRef out.",
        {"spec.messaging": {"url": "nats://nats:4222", "credentialsSecretRef": {"name": "nats"}}},
    ),
)

ON_A_CLUSTER = {"spec.storage.checkpoint.persistentVolumeClaim": {"claimName": "ckpt"}}


def container(name: str, **fields: object) -> dict[str, Any]:
    return {"name": name, **fields}


CLUSTER_CASES = (
    Case(
        "restarts-keep-checkpoints",
        {"spec.storage": {}},
        "spec.storage.checkpoint.persistentVolumeClaim",
        "nothing; failurePolicy.maxRestarts is 3",
        "is required while failurePolicy.maxRestarts is above 0: a new trainer pod finds no checkpoint of the old one",
        "Name a claim, or set failurePolicy.maxRestarts to 0.",
        {"spec.storage": {}, "spec.failurePolicy.maxRestarts": 0},
    ),
    Case(
        "trainer-template-owned-fields",
        {f"{TEMPLATE}.containers": [container("trainer", command=["sh"])]},
        "spec.trainer.template.spec.containers[0].command",
        '["sh"]',
        OWNED.format("trainer"),
        "Remove it.",
        {f"{TEMPLATE}.containers": [container("sidecar", command=["sh"]), container("trainer", image="mine")]},
    ),
    Case(
        "trainer-template-owned-fields",
        {f"{TEMPLATE}.containers": [container("trainer", env=[{"name": "A"}, {"name": "RLJOB_UID", "value": "1"}])]},
        "spec.trainer.template.spec.containers[0].env[1].name",
        '"RLJOB_UID"',
        OWNED.format("trainer"),
        "Remove it.",
        {f"{TEMPLATE}.containers": [container("trainer", env=[{"name": "NCCL_DEBUG", "value": "INFO"}])]},
    ),
    Case(
        "trainer-template-owned-fields",
        {f"{TEMPLATE}.restartPolicy": "Always"},
        "spec.trainer.template.spec.restartPolicy",
        '"Always"',
        OWNED.format("trainer"),
        "Remove it.",
        {f"{TEMPLATE}.nodeSelector": {"pool": "gpu"}},
    ),
    Case(
        "rollout-template-owned-fields",
        {f"{POOLS}.0.template.spec.containers": [container("rollout", volumeMounts=[{"mountPath": "/dev/shm"}])]},
        "spec.rolloutPools[0].template.spec.containers[0].volumeMounts[0].mountPath",
        '"/dev/shm"',
        OWNED.format("rollout"),
        "Remove it.",
        {f"{POOLS}.0.template.spec.containers": [container("rollout", volumeMounts=[{"mountPath": "/data"}])]},
    ),
    Case(
        "old-policy-template-owned-fields",
        DEDICATED | {f"{OLD_POLICY}.containers": [container("old-policy", readinessProbe={})]},
        "spec.oldPolicyPool.template.spec.containers[0].readinessProbe",
        "{}",
        OWNED.format("old-policy"),
        "Remove it.",
        DEDICATED | {f"{OLD_POLICY}.containers": [container("rollout", readinessProbe={}), container("old-policy")]},
    ),
    Case(
        "old-policy-template-containers",
        DEDICATED | {f"{OLD_POLICY}.containers": [container("")]},
        "spec.oldPolicyPool.template.spec.containers[0]",
        '{"name": ""}',
        CONTAINERS,
        "Write each container after `- name: `, the runtime's own as `- name: old-policy`.",
        DEDICATED | {f"{OLD_POLICY}.containers": [container("old-policy")]},
    ),
    Case(
        "old-policy-template-container-names",
        DEDICATED | {f"{OLD_POLICY}.containers": [container("old-policy"), container("old-policy")]},
        "spec.oldPolicyPool.template.spec.containers[1].name",
        '"old-policy"',
        "is the name of another container of the pod",
        "Give each container its own name.",
        DEDICATED | {f"{OLD_POLICY}.containers": [container("old-policy"), container("logs")]},
    ),
    Case(
        "trainer-template-containers",
        {f"{TEMPLATE}.containers": {"trainer": {"image": "mine"}}},
        "spec.trainer.template.spec.containers",
        '{"trainer": {"image": "mine"}}',
        CONTAINERS,
        "Write each container after `- name: `, the runtime's own as `- name: trainer`.",
        {f"{TEMPLATE}.containers": [container("trainer", image="mine")]},
    ),
    Case(
        "rollout-template-containers",
        {f"{POOLS}.0.template.spec.containers": [container("rollout"), {"image": "mine"}]},
        "spec.rolloutPools[0].template.spec.containers[1]",
        '{"image": "mine"}',
        CONTAINERS,
        "Write each container after `- name: `, the runtime's own as `- name: rollout`.",
        {f"{POOLS}.0.template.spec.containers": [container("rollout"), container("a" * 63)]},
    ),
    Case(
        "trainer-template-container-names",
        {f"{TEMPLATE}.containers": [container("trainer"), container("trainer")]},
        "spec.trainer.template.spec.containers[1].name",
        '"trainer"',
        "is the name of another container of the pod",
        "Give each container its own name.",
        {f"{TEMPLATE}.containers": [container("trainer"), container("logs")]},
    ),
    Case(
        "rollout-template-container-names",
        {
            f"{POOLS}.0.template.spec": {
                "initContainers": [container("rollout")],
                "containers": [container("rollout")],
            }
        },
        "spec.rolloutPools[0].template.spec.containers[0].name",
        '"rollout"',
        "is the name of another container of the pod",
        "Give each container its own name.",
        {f"{POOLS}.0.template.spec.containers": [container("rollout")]},
    ),
)
