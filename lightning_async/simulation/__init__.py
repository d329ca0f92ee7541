"""A cluster in virtual time: the holder and the barrier of a real run, driven by an event queue; no Lightning."""

from lightning_async.simulation.cluster import ExchangeTimes, VirtualCluster, play
from lightning_async.simulation.step_times import StepTime, StepTimes

__all__ = ["ExchangeTimes", "StepTime", "StepTimes", "VirtualCluster", "play"]
