"""Small tasks to plan: a model on devices of a roofline."""

from sagellm.load.synthetic import parse_synthetic
from sagellm.planning.plan_task import PlanTask
from sagellm.planning.service_level import parse_service_level
from sagellm.runtime.engine.costs.profile import read_profile
from sagellm.runtime.models.shapes import SHAPES

LOAD = "rate=30,requests=60,input=lognormal:1500:0.6,output=exponential:40"


def plan_task(
    model="llama-3-8b", *, gpu="h100-sxm", slo="ttft=0.2,tpot=0.012", load=LOAD, workload=None
):
    profile = read_profile(gpu)
    if workload is None:
        workload = list(parse_synthetic(f"synthetic:{load}").generate())
    return PlanTask(
        model,
        SHAPES[model],
        gpu,
        profile,
        profile.cost.memory_bytes,
        0.9,
        profile.cost.link_bytes_per_s,
        parse_service_level(slo),
        workload,
    )
