"""Every enum, bound and required field of the CRD, as data: what is refused, and the nearest that is accepted.

Written out, not computed: a bound that changes in the models changes the API, and has to be changed here too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.unit.api.documents import REMOVE, changed
from tests.unit.api.rule_cases import ON_A_CLUSTER

Changes = dict[str, Any]
Pair = tuple[Any, Any]
AS_IT_IS = object()
"""As accepted value: what the context has there already."""


@dataclass(frozen=True)
class Bound:
    """One constraint at one dotted path (list items by index)."""

    path: str
    keyword: str
    refused: Any
    accepted: Any
    also: Changes
    """Changes that go with both, so that the neighbour breaks no other rule."""

    @property
    def constraint(self) -> tuple[str, str]:
        """The constraint as a walk over the schema names it."""
        return self.path.replace(".0", "[*]").replace(".ANY_KEY", ".*"), self.keyword

    @property
    def id(self) -> str:
        return f"{self.path}:{self.keyword}"

    def accepted_document(self) -> dict[str, Any]:
        return changed(ON_A_CLUSTER | self.also | ({} if self.accepted is AS_IT_IS else {self.path: self.accepted}))

    def refused_document(self) -> dict[str, Any]:
        around = {} if self.accepted is AS_IT_IS or self.refused is not REMOVE else {self.path: self.accepted}
        return changed(ON_A_CLUSTER | self.also | around, {self.path: self.refused})


ROOM = {"spec.messaging.trajectoryStreamBytes": 1 << 50}
RANDOM = {"spec.model": {"random": {}}, "spec.sampling.maxTrajectoryTokens": 512}
HUB = {"spec.model": {"huggingFace": {"repo": "a/b", "revision": "c"}}}
CLAIM = {"spec.model": {"persistentVolumeClaim": {"claimName": "a"}}}
RULE = {"spec.failurePolicy.rules": [{"name": "r", "pools": ["trainer"], "onReasons": ["X"], "action": "Ignore"}]}
POD_CONDITION = {
    "spec.failurePolicy.rules": [{"name": "r", "onPodConditions": [{"type": "DisruptionTarget"}], "action": "Ignore"}]
}
DEDICATED = {"spec.correction.oldLogprobs": "Dedicated", "spec.oldPolicyPool": {}}
SMALL = {
    "spec.storage.checkpoint.everySteps": 1,
    "spec.staleness.maxVersions": 0,
    "spec.training.tasksPerStep": 1,
    "spec.sampling.samplesPerTask": 2,
}
POOL, OLD_POLICY, FAILURE = "spec.rolloutPools.0", "spec.oldPolicyPool", "spec.failurePolicy.rules.0"
CONTAINERS = tuple(f"{pool}.template.spec.containers" for pool in ("spec.trainer", POOL, OLD_POLICY))
TIME = ("2026-11-23 01:00:00", "2026-11-23T01:00:00Z")


def _route(path: str) -> Changes:
    return DEDICATED if path.startswith(OLD_POLICY) else {}


CONTEXTS: tuple[tuple[str, Changes], ...] = (
    ("spec.model.random.maxPositions", RANDOM | {"spec.sampling": {"maxTokens": 8, "maxTrajectoryTokens": 16}}),
    ("spec.model.random", RANDOM),
    ("spec.model.huggingFace", HUB),
    ("spec.model.persistentVolumeClaim", CLAIM),
    ("spec.model.path", {}),
    (
        "spec.sampling.maxTokens",
        ROOM | {"spec.messaging.maxPayloadBytes": 64 << 20, "spec.sampling.maxTrajectoryTokens": 1 << 20},
    ),
    (
        "spec.sampling.maxTrajectoryTokens",
        ROOM | {"spec.messaging.maxPayloadBytes": 64 << 20, "spec.sampling.maxTokens": 1},
    ),
    ("spec.training.miniBatches", ROOM | {"spec.training.tasksPerStep": 1024}),
    ("spec.messaging.trajectoryStreamBytes", SMALL),
    (
        "spec.messaging.credentialsSecretRef",
        {"spec.messaging": {"url": "nats://a:4222", "credentialsSecretRef": {"name": "a"}}},
    ),
    ("spec.rolloutPools.0.replicas", {"spec.rolloutPools.0.minReplicas": 0}),
    (f"{FAILURE}.onPodConditions", POD_CONDITION),
    ("spec.failurePolicy.rules.0", RULE),
    ("spec.sampling.badWords.0", {"spec.sampling.badWords": [""]}),
    ("spec.storage.weights.persistentVolumeClaim", {"spec.storage.weights.persistentVolumeClaim.claimName": "a"}),
    *((f"{containers}.0", _route(containers) | {containers: [{"name": "a"}]}) for containers in CONTAINERS),
    (OLD_POLICY, DEDICATED),
    ("spec.", ROOM),
    ("status.weights.servingVersions.0", {"status.weights.servingVersions": [{"version": 1, "pods": 1}]}),
    ("status.pools.0", {"status.pools": [{"name": "main", "laggards": ["pod"]}]}),
    ("status.checkpoint", {"status.checkpoint": {"version": 1, "step": 1, "uri": "pvc://a/b"}}),
    ("status.finalModel", {"status.finalModel": {"version": 1, "uri": "pvc://a/b"}}),
    ("status.conditions.0", {"status.conditions": [{"type": "Ready", "status": "True", "reason": "Training"}]}),
    ("", {}),
)
"""What a path needs around it; the first that it starts with counts."""

NUMBERS: tuple[tuple[str, Pair | None, Pair | None], ...] = (
    ("spec.activeDeadlineSeconds", (0, 1), None),
    ("spec.startDeadlineSeconds", (0, 1), None),
    ("spec.ttlSecondsAfterFinished", (-1, 0), None),
    ("spec.model.random.hiddenSize", (7, 8), (8193, 8192)),
    ("spec.model.random.intermediateSize", (7, 8), (65537, 65536)),
    ("spec.model.random.layers", (0, 1), (129, 128)),
    ("spec.model.random.heads", (0, 1), (129, 128)),
    ("spec.model.random.keyValueHeads", (0, 1), None),
    ("spec.model.random.maxPositions", (15, 16), (1048577, 1048576)),
    ("spec.model.random.initializerRange", (0, 1e-9), (1.1, 1)),
    ("spec.model.random.seed", (-1, 0), None),
    ("spec.environment.timeoutSeconds", (0, 0.001), (86400.5, 86400)),
    ("spec.environment.maxAttempts", (0, 1), (101, 100)),
    ("spec.sampling.temperature", (0, 0.01), (100.5, 100)),
    ("spec.sampling.maxTokens", (0, 1), (1048576, 1048575)),
    ("spec.sampling.maxTrajectoryTokens", (1, 2), (1048577, 1048576)),
    ("spec.sampling.samplesPerTask", (0, 2), (1025, 1024)),  # 1 is the rule group-has-siblings
    ("spec.training.steps", (0, 1), (10_000_001, 10_000_000)),
    ("spec.training.tasksPerStep", (0, 1), (65537, 65536)),
    ("spec.training.learningRate", (0, 1e-9), (1.5, 1)),
    ("spec.training.warmupSteps", (-1, 0), None),
    ("spec.training.weightDecay", (-0.1, 0), (1.1, 1)),
    ("spec.training.beta1", (-0.1, 0), (1, 0.999)),
    ("spec.training.beta2", (-0.1, 0), (1, 0.999)),
    ("spec.training.gradientClip", (0, 1e-9), None),
    ("spec.training.entropyCoefficient", (-0.1, 0), (1.1, 1)),
    ("spec.training.miniBatches", (0, 1), (1025, 1024)),
    ("spec.training.epochs", (0, 1), (65, 64)),
    ("spec.training.tokensPerMicroBatch", (15, 16), None),
    ("spec.training.minGroupSize", (0, 1), None),
    ("spec.training.stragglerTimeoutSeconds", (0, 0.001), None),
    ("spec.training.seed", (-1, 0), None),
    ("spec.staleness.maxVersions", (-1, 0), (1025, 1024)),
    ("spec.correction.snapshots.memoryBytes", (-1, 0), ((1 << 50) + 1, 1 << 50)),
    ("spec.correction.eager.prefixTokens", (-1, 0), ((1 << 20) + 1, 1 << 20)),
    ("spec.correction.ewma.decay", (-0.1, 0), (1, 0.999)),
    ("spec.correction.ewma.window", (0, 1), (1025, 1024)),
    ("spec.correction.ewma.reset.threshold", (-0.1, 0), (1.1, 1)),
    ("spec.correction.ewma.reset.patience", (0, 1), (1001, 1000)),
    ("spec.correction.dedicatedTimeoutSeconds", (0, 0.001), (86400.5, 86400)),
    ("spec.correction.barrierTimeoutSeconds", (0, 0.001), (3600.5, 3600)),
    ("spec.correction.auditFraction", (-0.01, 0), (0.051, 0.05)),
    ("spec.correction.clip.low", (-0.1, 0), (1, 0.999)),
    ("spec.correction.clip.high", (-0.1, 0), None),
    ("spec.correction.discrepancy.low", (0, 1e-9), (1.01, 1)),
    ("spec.correction.discrepancy.high", (0.99, 1), None),
    ("spec.correction.discrepancy.weightCap", (0, 1e-9), None),
    ("spec.weightSync.timeoutSeconds", (0, 0.001), (86400.5, 86400)),
    ("spec.weightSync.coordinatorTimeoutSeconds", (0, 0.001), (86400.5, 86400)),
    ("spec.storage.checkpoint.everySteps", (0, 1), (10_000_001, 10_000_000)),
    ("spec.storage.checkpoint.keep", (0, 1), (1001, 1000)),
    ("spec.messaging.maxPayloadBytes", ((1 << 20) - 1, 1 << 20), ((64 << 20) + 1, 64 << 20)),
    ("spec.messaging.trajectoryStreamBytes", ((16 << 20) - 1, 16 << 20), ((1 << 50) + 1, 1 << 50)),
    ("spec.trainer.replicas", (0, 1), (4097, 4096)),
    ("spec.trainer.processesPerReplica", (0, 1), (65, 64)),
    ("spec.trainer.stallSeconds", (0, 1), None),
    (f"{OLD_POLICY}.replicas", (0, 1), (1001, 1000)),
    (f"{POOL}.replicas", (-1, 0), (10001, 10000)),
    (f"{POOL}.minReplicas", (-1, 0), None),
    (f"{POOL}.maxConcurrentTrajectories", (0, 1), (4097, 4096)),
    (f"{POOL}.engine.vllm.tensorParallelSize", (0, 1), (65, 64)),
    (f"{POOL}.engine.vllm.kvCacheBytes", ((1 << 20) - 1, 1 << 20), None),
    (f"{POOL}.engine.simulated.decodeSeconds", (-0.1, 0), (10.1, 10)),
    (f"{POOL}.engine.simulated.prefillSeconds", (-0.1, 0), (10.1, 10)),
    (f"{POOL}.engine.simulated.loadSeconds", (-0.1, 0), (600.1, 600)),
    ("spec.failurePolicy.maxRestarts", (-1, 0), (10001, 10000)),
    *(
        (f"status.{path}", (-1, 0), None)
        for path in (
            "observedGeneration",
            "attempt",
            "restarts.total",
            "restarts.counted",
            "step",
            "weights.epoch",
            "weights.published",
            "weights.desired",
            "weights.convergedPods",
            "weights.servingVersions.0.version",
            "weights.servingVersions.0.pods",
            "staleness.p50",
            "staleness.p95",
            "staleness.max",
            "correction.interruptions",
            "correction.tokens.trained",
            "correction.tokens.salvaged",
            "correction.tokens.lost",
            "correction.tokens.dropped",
            "throughput.tokensPerSecond",
            "pools.0.desired",
            "pools.0.ready",
            "pools.0.restarts",
            "checkpoint.version",
            "checkpoint.step",
            "finalModel.version",
            "conditions.0.observedGeneration",
        )
    ),
    ("status.throughput.trainerIdlePercent", (-1, 0), (101, 100)),
    ("status.throughput.rolloutIdlePercent", (-1, 0), (101, 100)),
)
"""(path, (refused, accepted) at the lower end, the same at the upper end)."""

TEXTS: tuple[tuple[str, bool, int], ...] = (
    ("spec.model.huggingFace.repo", True, 256),
    ("spec.model.huggingFace.revision", True, 256),
    ("spec.model.persistentVolumeClaim.claimName", True, 253),
    ("spec.model.persistentVolumeClaim.path", False, 4096),
    ("spec.model.path", True, 4096),
    ("spec.environment.name", True, 63),
    ("spec.storage.checkpoint.persistentVolumeClaim.claimName", True, 253),
    ("spec.storage.weights.persistentVolumeClaim.claimName", True, 253),
    ("spec.messaging.url", True, 2048),
    ("spec.messaging.credentialsSecretRef.name", True, 253),
    *((f"{containers}.0.name", True, 63) for containers in CONTAINERS),
    (f"{FAILURE}.name", True, 63),
    (f"{FAILURE}.onReasons.0", False, 128),
    (f"{FAILURE}.onPodConditions.0.type", True, 316),
    ("status.runtimeImage", False, 1024),
    ("status.pools.0.name", False, 63),
    ("status.pools.0.laggards.0", False, 253),
    ("status.checkpoint.uri", True, 4096),
    ("status.finalModel.uri", True, 4096),
    *((f"status.columns.{name}", False, 64) for name in ("converged", "staleness", "rollouts", "trainer")),
    ("status.conditions.0.type", False, 316),
    ("status.conditions.0.reason", True, 1024),
    ("status.conditions.0.message", False, 32768),
)
"""(path, whether an empty text is refused, characters of the longest)."""

ROUTES = (
    "Resident",
    "Snapshot",
    "Dedicated",
    "Interruption",
    "Ewma",
    "Linear",
    "LogLinear",
    "Current",
    "Engine",
)
ENUMS: dict[str, tuple[Any, ...]] = {
    "spec.model.random.architecture": ("Llama", "Qwen3"),
    "spec.model.random.headDim": (32, 64, 96, 128, 256),
    "spec.training.computeType": ("Float32", "BFloat16"),
    "spec.training.advantage.estimator": ("GRPO", "RLOO"),
    "spec.training.advantage.credit": ("Trajectory", "Turn"),
    "spec.staleness.onExceeded": ("MaskTokens", "DropGroup", "Wait"),
    "spec.correction.oldLogprobs": ROUTES,
    "spec.correction.fallback": ("Drop", "Ewma"),
    "spec.correction.objective": ("Decoupled", "Coupled"),
    "spec.correction.discrepancy.granularity": ("Token", "Segment", "Sequence"),
    "spec.correction.discrepancy.weight": ("None", "Truncated", "Raw"),
    "spec.weightSync.mode": ("Interrupt",),
    f"{POOL}.engine.vllm.computeType": ("Float32", "BFloat16"),
    f"{FAILURE}.action": ("FailJob", "RestartJob", "RestartPool", "Ignore"),
    f"{FAILURE}.onPodConditions.0.status": ("True", "False", "Unknown"),
    "status.correction.route": ROUTES,
    "status.conditions.0.status": ("True", "False", "Unknown"),
}

REQUIRED = (
    "spec",
    "spec.model",
    "spec.environment",
    "spec.training",
    "spec.rolloutPools",
    "spec.model.huggingFace.repo",
    "spec.model.huggingFace.revision",
    "spec.model.persistentVolumeClaim.claimName",
    "spec.environment.name",
    "spec.training.steps",
    "spec.training.tasksPerStep",
    "spec.training.learningRate",
    "spec.storage.checkpoint.persistentVolumeClaim.claimName",
    "spec.storage.weights.persistentVolumeClaim.claimName",
    "spec.messaging.credentialsSecretRef.name",
    f"{POOL}.name",
    *(f"{containers}.0.name" for containers in CONTAINERS),
    f"{FAILURE}.name",
    f"{FAILURE}.action",
    f"{FAILURE}.onPodConditions.0.type",
    "status.weights.servingVersions.0.version",
    "status.weights.servingVersions.0.pods",
    "status.pools.0.name",
    "status.checkpoint.version",
    "status.checkpoint.step",
    "status.checkpoint.uri",
    "status.finalModel.version",
    "status.finalModel.uri",
    "status.conditions.0.type",
    "status.conditions.0.status",
    "status.conditions.0.reason",
)


def _pools(count: int) -> list[Changes]:
    return [{"name": f"p{index}"} for index in range(count)]


def _reasons(count: int) -> list[Changes]:
    return [{"name": f"r{index}", "onReasons": ["X"], "action": "Ignore"} for index in range(count)]


def _keys(count: int) -> dict[str, int]:
    return {f"k{index}": index for index in range(count)}


def _characters(count: int) -> str:
    return "".join(chr(0x4E00 + index) for index in range(count))


_CONDITIONS = [{"type": f"T{index}", "status": "True", "reason": "R"} for index in range(33)]

OTHERS: tuple[tuple[str, str, Any, Any], ...] = (
    ("metadata.name", "maxLength", "a" * 254, "a" * 40),  # up to 253 it is the rule job-name
    ("spec.model.random.alphabet", "minLength", "", "a"),
    ("spec.model.random.alphabet", "maxLength", _characters(1025), _characters(1024)),
    ("spec.environment.parameters", "maxProperties", _keys(257), _keys(256)),
    ("spec.sampling.logitBias", "maxProperties", _keys(1025), {}),
    ("spec.sampling.badWords", "maxItems", ["x"] * 1025, []),
    ("spec.sampling.badWords.0", "maxLength", "x" * 257, REMOVE),
    ("spec.sampling.guidedDecoding", "maxProperties", {f"k{index}": "x" for index in range(65)}, None),
    ("spec.sampling.guidedDecoding.ANY_KEY", "maxLength", "x" * 1025, AS_IT_IS),
    ("spec.storage.weights.nats", "maxProperties", {"replicas": True}, {}),
    ("spec.rolloutPools", "minItems", [], _pools(1)),
    ("spec.rolloutPools", "maxItems", _pools(17), _pools(16)),
    ("spec.rolloutPools", "list-map", [{"name": "a"}, {"name": "a"}], [{"name": "a"}, {"name": "b"}]),
    (f"{POOL}.name", "maxLength", "a" * 64, "a" * 16),  # up to 63 it is the rule pool-name
    ("spec.failurePolicy.rules", "maxItems", _reasons(33), _reasons(32)),
    (f"{FAILURE}.pools", "maxItems", ["trainer"] * 19, ["trainer"] * 18),
    (f"{FAILURE}.pools.0", "maxLength", "a" * 64, "trainer"),
    (f"{FAILURE}.onReasons", "maxItems", ["X"] * 65, ["X"] * 64),
    (f"{FAILURE}.onPodConditions", "maxItems", [{"type": "X"}] * 33, [{"type": "X"}] * 32),
    *((path, "maxItems", _pools(65), _pools(64)) for path in CONTAINERS),
    *((path, "list-map", [{"name": "a"}] * 2, [{"name": "a"}, {"name": "b"}]) for path in CONTAINERS),
    ("status.startTime", "pattern", *TIME),
    ("status.startedTime", "pattern", *TIME),
    ("status.completionTime", "pattern", *TIME),
    ("status.conditions.0.lastTransitionTime", "pattern", *TIME),
    ("status.correction.exactFraction", "pattern", "99%", "0.99"),
    ("status.correction.exactFraction", "maxLength", "1" * 33, "1" * 32),
    ("status.correction.keepFraction", "pattern", "99%", "0.99"),
    ("status.correction.keepFraction", "maxLength", "1" * 33, "1" * 32),
    ("status.correction.clipFraction", "pattern", "99%", "0.99"),
    ("status.correction.clipFraction", "maxLength", "1" * 33, "1" * 32),
    ("status.correction.pooledFraction", "pattern", "99%", "0.99"),
    ("status.correction.pooledFraction", "maxLength", "1" * 33, "1" * 32),
    ("status.correction.leak", "pattern", "99%", "0.99"),
    ("status.correction.leak", "maxLength", "1" * 33, "1" * 32),
    (
        "status.weights.servingVersions",
        "maxItems",
        [{"version": index, "pods": 1} for index in range(257)],
        [{"version": index, "pods": 1} for index in range(256)],
    ),
    ("status.pools", "maxItems", _pools(18), _pools(17)),
    ("status.pools", "list-map", [{"name": "a"}] * 2, [{"name": "a"}, {"name": "b"}]),
    ("status.pools.0.laggards", "maxItems", ["pod"] * 11, ["pod"] * 10),
    ("status.conditions", "maxItems", _CONDITIONS, _CONDITIONS[:32]),
    ("status.conditions", "list-map", [_CONDITIONS[0]] * 2, _CONDITIONS[:2]),
)
"""(path, keyword, refused, accepted)."""


BESIDE: dict[Any, Changes] = {
    "Resident": {"spec.staleness.maxVersions": 0},
    "Dedicated": {"spec.oldPolicyPool": {}},
}
"""What a route needs beside itself."""


def _context(path: str) -> Changes:
    return next(changes for prefix, changes in CONTEXTS if path.startswith(prefix))


def _all() -> list[Bound]:
    bounds = []
    for path, low, high in NUMBERS:
        for keyword, pair in (("minimum", low), ("maximum", high)):
            if pair is not None:
                bounds.append(Bound(path, keyword, *pair, _context(path)))
    for path, must_say, longest in TEXTS:
        if must_say:
            bounds.append(Bound(path, "minLength", "", "a", _context(path)))
        bounds.append(Bound(path, "maxLength", "a" * (longest + 1), "a" * longest, _context(path)))
    for path, values in ENUMS.items():
        for value in values:
            also = BESIDE.get(value, {}) if path == "spec.correction.oldLogprobs" else {}
            bounds.append(
                Bound(path, "enum", 33 if isinstance(value, int) else value.lower(), value, _context(path) | also)
            )
    bounds += [Bound(path, "required", REMOVE, AS_IT_IS, _context(path)) for path in REQUIRED]
    return bounds + [Bound(path, keyword, bad, good, _context(path)) for path, keyword, bad, good in OTHERS]


BOUNDS: tuple[Bound, ...] = tuple(_all())
