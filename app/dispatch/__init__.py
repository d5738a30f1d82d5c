"""Sending experiments to workers: one protocol, one fair queue a device, one process a device."""

from app.dispatch.base import DeviceStatus, Dispatch
from app.dispatch.local import LocalDispatch

__all__ = ["DeviceStatus", "Dispatch", "LocalDispatch"]
