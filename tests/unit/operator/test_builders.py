"""What the children hold: GPUs, shared memory, NCCL's environment, the user's template kept, the restricted level met."""

from __future__ import annotations

import json
from typing import Any

from tests.fakes.kubernetes import FakeKubernetes
from tests.unit.operator.scenarios import DEDICATED, running

from rljob_api import names

GPU_TRAINER = {
    "replicas": 4,
    "processesPerReplica": 8,
    "template": {
        "metadata": {"labels": {"team": "a"}, "annotations": {"example.com/cost": "7"}},
        "spec": {
            "priorityClassName": "training",
            "schedulerName": "volcano",
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
            "nodeSelector": {"nvidia.com/gpu.product": "H100"},
            "hostIPC": False,
            "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}],
            "initContainers": [{"name": "warm", "image": "busybox"}],
            "containers": [
                {
                    "name": "trainer",
                    "image": "example.com/mine:1",
                    "resources": {"limits": {"nvidia.com/gpu": "8", "rdma/hca": "1"}},
                    "env": [{"name": "NCCL_IB_HCA", "value": "mlx5"}, {"name": "HOME", "value": "/data/home"}],
                    "volumeMounts": [{"name": "data", "mountPath": "/data"}],
                    "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}},
                },
                {"name": "exporter", "image": "example.com/exporter:1"},
            ],
        },
    },
}
GPU_POOL = {
    "name": "main",
    "replicas": 2,
    "engine": {"vllm": {"tensorParallelSize": 4}},
    "template": {"spec": {"containers": [{"name": "rollout", "resources": {"limits": {"nvidia.com/gpu": "4"}}}]}},
}


GPU_OLD_POLICY = {
    "replicas": 3,
    "template": {
        "metadata": {"labels": {"team": "a"}},
        "spec": {
            "nodeSelector": {"nvidia.com/gpu.product": "L40S"},
            "containers": [{"name": "old-policy", "resources": {"limits": {"nvidia.com/gpu": "1"}}}],
        },
    },
}


def gpu_job() -> FakeKubernetes:
    return running({"spec.trainer": GPU_TRAINER, "spec.rolloutPools": [GPU_POOL]})


def trainer(fake: FakeKubernetes) -> dict[str, Any]:
    (job,) = fake.of_kind("Job")
    return job


def rollout(fake: FakeKubernetes) -> dict[str, Any]:
    return fake.objects["Deployment", "job-main"]


def old_policy(fake: FakeKubernetes) -> dict[str, Any]:
    return fake.objects["Deployment", "job-old-policy"]


def container(workload: dict[str, Any], name: str) -> dict[str, Any]:
    return next(item for item in workload["spec"]["template"]["spec"]["containers"] if item["name"] == name)


def environment(item: dict[str, Any]) -> dict[str, str]:
    return {variable["name"]: variable.get("value", "<field>") for variable in item["env"]}


def test_the_users_scheduling_fields_and_devices_stay_as_they_are() -> None:
    spec = trainer(gpu_job())["spec"]["template"]["spec"]
    wanted = GPU_TRAINER["template"]["spec"]  # type: ignore[index]
    for field in ("priorityClassName", "schedulerName", "tolerations", "nodeSelector"):
        assert spec[field] == wanted[field]
    item = container(trainer(gpu_job()), "trainer")
    assert item["resources"] == {"limits": {"nvidia.com/gpu": "8", "rdma/hca": "1"}}
    assert item["image"] == "example.com/mine:1"
    assert (environment(item)["NCCL_IB_HCA"], environment(item)["NCCL_DEBUG"]) == ("mlx5", "WARN")
    assert environment(item)["HOME"] == "/data/home"
    assert [volume["name"] for volume in spec["volumes"]][:1] == ["data"]
    metadata = trainer(gpu_job())["spec"]["template"]["metadata"]
    assert metadata["labels"]["team"] == "a"
    assert metadata["annotations"]["example.com/cost"] == "7"


def test_a_gang_is_as_wide_as_asked_for_and_finds_its_first_pod_by_name() -> None:
    job = trainer(gpu_job())
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"], spec["backoffLimit"]) == (
        "Indexed",
        4,
        4,
        0,
    )
    command = container(job, "trainer")["command"]
    assert command[:3] == ["python", "-m", "rljob_runtime.trainer.launch"]
    assert {"--nodes=4", "--processes=8", "--main-address=job-trainer-1-0.job-trainer", "--main-port=29400"} <= set(
        command
    )
    assert spec["template"]["spec"]["subdomain"] == "job-trainer"
    assert spec["template"]["spec"]["restartPolicy"] == "Never"


def test_who_asks_for_a_gpu_must_find_one_and_who_does_not_is_not_asked() -> None:
    fake = gpu_job()
    assert environment(container(trainer(fake), "trainer"))[names.ENV_ACCELERATOR] == "cuda"
    assert environment(container(rollout(fake), "rollout"))[names.ENV_ACCELERATOR] == "cuda"
    plain = running()
    assert names.ENV_ACCELERATOR not in environment(container(trainer(plain), "trainer"))


def test_engines_are_told_how_many_gpus_they_span() -> None:
    fake = gpu_job()
    name = next(
        volume["configMap"]["name"]
        for volume in rollout(fake)["spec"]["template"]["spec"]["volumes"]
        if "configMap" in volume
    )
    config = fake.objects["ConfigMap", name]
    assert config["immutable"] is True
    told = json.loads(config["data"]["rljob.json"])
    assert told["spec"]["rolloutPools"][0]["engine"]["vllm"]["tensorParallelSize"] == 4
    assert "template" not in told["spec"]["trainer"]


def test_shared_memory_is_a_volume_of_its_own() -> None:
    for workload, name in ((trainer(gpu_job()), "trainer"), (rollout(gpu_job()), "rollout")):
        volumes = {volume["name"]: volume for volume in workload["spec"]["template"]["spec"]["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in container(workload, name)["volumeMounts"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory"}


def test_every_container_meets_the_restricted_level_and_what_the_user_asked_for_is_kept() -> None:
    spec = trainer(gpu_job())["spec"]["template"]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    for item in [*spec["containers"], *spec["initContainers"]]:
        assert item["securityContext"]["allowPrivilegeEscalation"] is False
    assert container(trainer(gpu_job()), "exporter")["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container(trainer(gpu_job()), "trainer")["securityContext"]["capabilities"] == {"add": ["IPC_LOCK"]}


def test_a_pool_rolls_without_asking_for_a_gpu_more_than_it_has() -> None:
    strategy = rollout(gpu_job())["spec"]["strategy"]
    assert strategy == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}


def test_logs_are_found_by_name_and_pool() -> None:
    fake = gpu_job()
    for workload, pool in ((trainer(fake), "trainer"), (rollout(fake), "main")):
        labels = workload["spec"]["template"]["metadata"]["labels"]
        assert (labels["rljob.dev/name"], labels["rljob.dev/pool"]) == ("job", pool)


def test_pods_of_a_sync_by_volume_share_the_claim_read_only() -> None:
    fake = running({"spec.storage.weights": {"persistentVolumeClaim": {"claimName": "weights"}}})
    mounts = {
        name: next(item for item in container(workload, name)["volumeMounts"] if item["name"] == "rljob-weights")
        for workload, name in ((trainer(fake), "trainer"), (rollout(fake), "rollout"))
    }
    assert mounts["rollout"]["readOnly"] is True
    assert "readOnly" not in mounts["trainer"]


def test_a_model_on_a_claim_is_mounted_in_the_trainer_alone() -> None:
    source = {"persistentVolumeClaim": {"claimName": "models", "path": "llama"}}
    fake = running({"spec.model": source})
    mount = next(item for item in container(trainer(fake), "trainer")["volumeMounts"] if item["name"] == "rljob-model")
    assert (mount["subPath"], mount["readOnly"]) == ("llama", True)
    assert environment(container(trainer(fake), "trainer"))[names.ENV_MODEL_DIR] == mount["mountPath"]
    assert not [item for item in container(rollout(fake), "rollout")["volumeMounts"] if item["name"] == "rljob-model"]


def test_credentials_come_as_a_file_of_the_secret() -> None:
    fake = running({"spec.messaging": {"url": "nats://other:4222", "credentialsSecretRef": {"name": "nats"}}})
    for workload, name in ((trainer(fake), "trainer"), (rollout(fake), "rollout")):
        variables = environment(container(workload, name))
        assert variables[names.ENV_NATS_URL] == "nats://other:4222"
        folder = variables[names.ENV_NATS_CREDENTIALS].rpartition("/")[0]
        mount = next(item for item in container(workload, name)["volumeMounts"] if item["mountPath"] == folder)
        volume = next(item for item in workload["spec"]["template"]["spec"]["volumes"] if item["name"] == mount["name"])
        assert volume["secret"]["secretName"] == "nats"


def test_an_old_policy_pool_is_a_deployment_of_scorers_of_its_own() -> None:
    fake = running(DEDICATED)
    deployment = old_policy(fake)
    assert deployment["spec"]["replicas"] == 2
    assert deployment["spec"]["strategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1},
    }
    labels = {"rljob.dev/name": "job", "rljob.dev/pool": "old-policy", "app.kubernetes.io/managed-by": "rljob"}
    assert deployment["spec"]["selector"] == {"matchLabels": labels}
    assert deployment["spec"]["template"]["metadata"]["labels"] == labels
    item = container(deployment, "old-policy")
    assert item["command"] == ["python", "-m", "rljob_runtime.old_policy"]
    told = environment(item)
    assert (told[names.ENV_POOL], told[names.ENV_UID]) == ("old-policy", fake.job["metadata"]["uid"])
    (worker,) = [variable for variable in item["env"] if variable["name"] == names.ENV_WORKER]
    assert worker["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.name"}}
    assert item["readinessProbe"]["exec"]["command"] == ["cat", told[names.ENV_READY_FILE]]
    assert names.ENV_ACCELERATOR not in told
    assert names.ENV_ATTEMPT not in told, "it outlives the trainer's attempts"


def test_an_old_policy_pool_has_no_disruption_budget_and_a_job_without_one_nothing_of_it() -> None:
    budgets = {name for kind, name in running(DEDICATED).objects if kind == "PodDisruptionBudget"}
    assert budgets == {"job-main"}
    assert not [name for _, name in running().objects if "old-policy" in name]


def test_an_old_policy_worker_that_asks_for_a_gpu_must_find_one_and_keeps_the_users_fields() -> None:
    fake = running(DEDICATED | {"spec.oldPolicyPool": GPU_OLD_POLICY})
    template = old_policy(fake)["spec"]["template"]
    item = container(old_policy(fake), "old-policy")
    assert environment(item)[names.ENV_ACCELERATOR] == "cuda"
    assert item["resources"] == {"limits": {"nvidia.com/gpu": "1"}}
    assert template["spec"]["nodeSelector"] == {"nvidia.com/gpu.product": "L40S"}
    assert template["metadata"]["labels"]["team"] == "a"
    assert item["securityContext"]["allowPrivilegeEscalation"] is False
    volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in item["volumeMounts"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory"}


def test_an_old_policy_worker_reads_a_configuration_named_by_its_hash_without_templates() -> None:
    fake = running(DEDICATED | {"spec.oldPolicyPool": GPU_OLD_POLICY})
    hashed = old_policy(fake)["metadata"]["annotations"][names.ANNOTATION_HASH]
    config = fake.objects["ConfigMap", f"job-old-policy-{hashed}"]
    mounted = [volume.get("configMap") for volume in old_policy(fake)["spec"]["template"]["spec"]["volumes"]]
    assert {"name": f"job-old-policy-{hashed}"} in mounted
    assert config["immutable"] is True
    assert json.loads(config["data"]["rljob.json"])["spec"]["oldPolicyPool"] == {"replicas": 3}


def test_an_old_policy_worker_reads_weights_and_credentials_as_rollout_workers_do() -> None:
    fake = running(
        DEDICATED
        | {"spec.storage.weights": {"persistentVolumeClaim": {"claimName": "weights"}}}
        | {"spec.messaging": {"url": "nats://other:4222", "credentialsSecretRef": {"name": "nats"}}}
    )
    theirs, own = container(rollout(fake), "rollout"), container(old_policy(fake), "old-policy")
    assert own["volumeMounts"] == theirs["volumeMounts"]
    pool = {"name": names.ENV_POOL, "value": "old-policy"}
    assert own["env"] == [pool if item["name"] == names.ENV_POOL else item for item in theirs["env"]]
