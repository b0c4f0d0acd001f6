"""Condition types and reasons: each string once, each with when it is used.

A reason's message is a full sentence with the next action; the same sentence goes to the Event and the log.
"""

from __future__ import annotations

from rljob_api.enums import DocumentedEnum


class ConditionType(DocumentedEnum):
    READY = "Ready", "Summary of the job: True while it trains; False with reason Succeeded once it is done."
    TRAINER_READY = "TrainerReady", "True while every trainer process of the attempt runs and steps."
    ROLLOUTS_READY = (
        "RolloutsReady",
        "True while every pool has at least minReplicas workers that serve a usable version.",
    )
    OLD_POLICY_READY = (
        "OldPolicyReady",
        "True while the old-policy pool has a worker that can score; only of a job with such a pool.",
    )
    WEIGHTS_CONVERGED = "WeightsConverged", "True while every live rollout worker serves the desired version."
    SUSPENDED = "Suspended", "True while spec.suspend holds the job and its pods are gone."
    DEGRADED = "Degraded", "True while the job goes on, but slower or with less protection than asked for."
    SUCCEEDED = "Succeeded", "True once all steps are trained and the final model is durable; final."
    FAILED = "Failed", "True once the job has given up; final."


class Reason(DocumentedEnum):
    # Progress of a healthy job.
    PENDING = "Pending", "The job was accepted and nothing has been made yet."
    STARTING = "Starting", "Children exist; the trainer, or the workers that a pool needs, do not run yet."
    TRAINING = "Training", "Steps are being trained."
    RESTARTING = "Restarting", "A new attempt is being made from the last checkpoint."
    SUSPENDING = "Suspending", "The trainer writes its checkpoint and the pods are going away."
    SUSPENDED = "Suspended", "spec.suspend is true and no pod is left."
    RESUMED = "Resumed", "spec.suspend went back to false."
    SUCCEEDED = "Succeeded", "All steps are trained and the final model is durable outside NATS."
    RUNNING = "Running", "All pods of the part that the condition speaks of run."
    CONVERGED = "Converged", "Every live rollout worker serves the desired version."
    SYNCING = "Syncing", "Workers are on their way to the desired version, within weightSync.timeoutSeconds."
    HEALTHY = "Healthy", "Nothing is degraded."

    # The job goes on, but not as asked.
    PODS_NOT_READY = "PodsNotReady", "Some pods of the part that the condition speaks of are not ready."
    LAGGING_WORKERS = "LaggingWorkers", "Workers have not converged within weightSync.timeoutSeconds."
    SWAP_SLOWER_THAN_STEP = (
        "SwapSlowerThanStep",
        "Pods times swap time, over those that may swap at once, is longer than a step: workers never catch up.",
    )
    VERSION_QUARANTINED = (
        "VersionQuarantined",
        "No worker could load a published version; workers stay on the one before.",
    )
    MESSAGING_UNAVAILABLE = "MessagingUnavailable", "The operator cannot reach the job's NATS server."
    CRD_OUTDATED = "CrdOutdated", "The installed CRD is older than the operator: it drops fields of the status."
    TRAJECTORY_STREAM_FULL = (
        "TrajectoryStreamFull",
        "The trajectory stream is above 70 % although the trainer checkpoints.",
    )
    PODS_UNSCHEDULABLE = "PodsUnschedulable", "No node has room for a pod, or fits its selectors and tolerations."
    PODS_REFUSED = "PodsRefused", "Kubernetes refuses to make pods: a quota, a limit range or the Pod Security level."
    IMAGE_UNAVAILABLE = "ImageUnavailable", "The image of a pod cannot be pulled."
    VOLUME_UNAVAILABLE = "VolumeUnavailable", "A volume cannot be mounted: a claim, Secret or ConfigMap is missing."
    CONTAINER_NOT_STARTED = "ContainerNotStarted", "The kubelet cannot make a container from its spec."
    CONTAINER_CRASHING = "ContainerCrashing", "A container ends again and again."
    PERMISSION_MISSING = "PermissionMissing", "The operator's role lacks a permission that the job needs."
    TRAINER_STALLED = "TrainerStalled", "No step heartbeat for trainer.stallSeconds: the gang restarts."
    TRAINER_FAILED = "TrainerFailed", "A trainer process ended with an error: the gang restarts from the checkpoint."
    POOL_FAILING = "PoolFailing", "Workers of a pool keep failing, within the pool's own budget."

    # The job has failed, or cannot start.
    INVALID_CONFIGURATION = (
        "InvalidConfiguration",
        "The spec or the environment's parameters were refused by a runtime process.",
    )
    INVALID_TEMPLATE = "InvalidTemplate", "The apiserver refused a pod template; the message holds the path."
    CHILD_CONFLICT = "ChildConflict", "An object of a child's name exists and is not this job's."
    ACCELERATOR_MISSING = "AcceleratorMissing", "A GPU was requested and the process found no CUDA device."
    START_DEADLINE_EXCEEDED = (
        "StartDeadlineExceeded",
        "The trainer, or the workers that a pool needs, did not run within startDeadlineSeconds.",
    )
    ACTIVE_DEADLINE_EXCEEDED = "ActiveDeadlineExceeded", "The job ran longer than activeDeadlineSeconds."
    MAX_RESTARTS_EXCEEDED = "MaxRestartsExceeded", "More counted restarts than failurePolicy.maxRestarts."
    FAILURE_POLICY = "FailurePolicy", "A rule of failurePolicy with the action FailJob matched."

    # Events only.
    CLEANUP_ABANDONED = (
        "CleanupAbandoned",
        "NATS stayed away for 120 s while the job was deleted; a sweep removes its streams later.",
    )
