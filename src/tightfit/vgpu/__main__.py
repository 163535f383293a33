"""The process in which a script meets the virtual GPU: `python -m tightfit.vgpu REQUEST RESULT SCRIPT ...`."""

import gc
import json
import os
import sys
from pathlib import Path

from tightfit.errors import TightfitError


def main() -> int:
    request_file, result_file, script, *arguments = sys.argv[1:]
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    gc.disable()  # what is imported stays: looking through it again and again costs a tenth of a short run
    from tightfit.vgpu.script import run_script
    from tightfit.vgpu.session import Request

    gc.freeze()
    gc.enable()

    try:
        request = json.loads(Path(request_file).read_text())
        if request.get("capability"):
            request["capability"] = tuple(request["capability"])
        result = run_script(script, arguments, Request(**request))
    except TightfitError as error:
        result = {"mistake": str(error), "exit_code": error.exit_code}
    Path(result_file).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # autograd's thread of a virtual device does not end by itself
