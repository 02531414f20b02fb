"""A job and its axes: planned, estimated, run, mirrored."""

from dagr_ray.study.job import Job, load_job, parse_axes
from dagr_ray.study.plan import Study, Trial, plan_study
from dagr_ray.study.run import run_study

__all__ = ["Job", "Study", "Trial", "load_job", "parse_axes", "plan_study", "run_study"]
