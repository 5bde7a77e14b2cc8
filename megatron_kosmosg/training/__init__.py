"""Loop, step, optimizer and metrics of a run. It knows no stage but through `stage.py`."""
