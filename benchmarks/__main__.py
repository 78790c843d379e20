"""python -m benchmarks: run every benchmark in this folder, or those named."""

import sys
from importlib import import_module
from pkgutil import iter_modules

import benchmarks
from benchmarks.command import run

if __name__ == "__main__":
    names = [found.name for found in iter_modules(benchmarks.__path__) if found.name != "__main__"]
    modules = [import_module(f"benchmarks.{name}") for name in names]
    sys.exit(run([module for module in modules if hasattr(module, "cases")]))
