"""The package version, alone so that a build can read it without importing torch.

Semantic versioning. What is promised is what ``ept.__all__``, ``ept_kernels.__all__``, ``ept.training.__all__`` and
``ept.data.__all__`` name, the options of the commands, and the files that are written: adapters, exports and checkpoints.

- A patch release (0.1.1) fixes errors; numbers may change in their last bits where that is the fix.
- A minor release (0.2.0) adds. Before 1.0 it may also change or remove what is promised, and CHANGELOG.md says how to
  adapt; from 1.0 on only a major release may, after a release that warns.
- Adapters that any earlier release saved can be loaded by every later one with the same major version.
- Raising the oldest supported version of Python, torch, transformers or peft is a minor release.
"""

__version__ = "0.1.0"
