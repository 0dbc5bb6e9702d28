"""Cost models of steps: fitted to measurements, from a device's roofline, or from tables; and the
profiles that hold them.
"""
