"""OpenVINO files of reduced precision: bfloat16 as a note for the runtime, int8 by NNCF."""
