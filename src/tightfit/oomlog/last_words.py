"""The last words of a log in which no format of a failure was found: an error, or a traceback that was cut off."""

import re
from collections.abc import Iterator, Sequence

from tightfit.oomlog.log_text import part

_ENDED = re.compile(r"^[\s>]*((?:[A-Za-z_][\w.]{0,80})?(?:Error|Exception|Interrupt|Exit)\b[^\n]{0,300})")
_LAST_LINE = re.compile(r"[A-Za-z_][\w.]{2,80}(?:: .*)?$")
"""The line that ends a traceback, whatever the class is called."""
_BEGUN = re.compile(r"[A-Za-z_][\w.]*(?<!Error)(?<!Exception)(?<!Interrupt)(?<!Exit)(?<!Warning)")
"""A word at the very end of a log, where the name of an error may be cut."""
_HEAD = re.compile(r"(?:(?P<named>[\w.]{3,80})\s{2,})?Traceback \(most recent call last\)")
_FRAME = re.compile(
    r'\s*File "[^"\n]{1,500}", line \d+|\s*(?:Cell In|Input In) ?\[|\s*-+> ?\d+'
    r"|[~/.\w<\\:-]{1,300}\.py(?::\d+|,? in )|[\s^~]+$"
)
_OF_CODE = re.compile(
    r"(?:\w+\.)*(?:Attribute|Type|Import|ModuleNotFound|Key|Name|Syntax|Indentation|Index|FileNotFound|NotImplemented)Error"
)
"""Mistakes in a program, which may name an attribute or an option that has memory in its name."""
_MEMORY = re.compile(
    r"\b(?:out of|insufficient|no enough|not enough|negligible|exceed\w*|lack of|low on|more|run\w* out of"
    r"|too (?:much|little)) (?!bounds\b|values\b|arguments\b|range\b)[\w -]{0,25}memory\b|\bOOM\b(?![=:] ?[\d.])"
    r"|\bmemory (?:error|exhausted|exceeded|limit|allocation|is full|overflow|full)"
    r"|(?:not|n't) fit (?:in|into|on|to)\b[^.\n]{0,20}\b(?:memory|GPU|V?RAM)\b"
    r"|\bmemory\b[^.\n]{0,30}\bcannot be allocated"
    r"|\b(?:needs?|requires?) (?:at least )?[\d.]+ ?[GM]i?B (?:of )?(?:\w+ )?(?:memory|V?RAM)\b"
    r"|\bmemory (?:is not|isn.t|not) (?:enough|sufficient)|\balloc\w* (?:\w+ )?memory fail|\bexceed\w* \d+% memory"
    r"|(?:can(?:not|'t)|could not|unable to|fail(?:ed|ure)? to) (?:re)?alloc|\bVRAM\b",
    re.IGNORECASE | re.ASCII,
)
_OF_MEMORY = re.compile(r"(?:\w+\.)*\w*(?:OutOf\w{0,12}Memory|MemoryError|ResourceExhausted)")
"""Classes of errors whose name says that memory ran out, whatever their message."""

_LACK = re.compile(
    r"\b(?:insufficient|no enough|not enough|out of|low on) (?:(?!bounds\b)\w+ )?memory\b|\bOOM\b(?![=:] ?[\d.])",
    re.IGNORECASE | re.ASCII,
)
_LEFT_OUT = re.compile(r"\bran out of (?:\w+ )?memory\b[^\n]{0,40}\bskip", re.IGNORECASE | re.ASCII)
"""A part of the work that a program left out for want of memory: what it did not write is then missing."""
_NEAR = 20
"""Last lines of a log, in which a lack of memory is looked for before an error is called another one."""
_FAILS = re.compile(
    r"(?:\b|(?<=\ds))(?:ERROR|FATAL|PANIC|[Ff]atal(?:(?: Python)? error)?"
    r"|[Ii]nternal error|Error|[Pp]anic)(?:\[\w+\])? ?: ?[A-Za-z'\"(\[/]"
    r"|\[E:onnxruntime|\bC(?:UDA|UDNN|UBLAS)(?:_FE)? failure \d{1,5}\b|\[ONNXRuntimeError\]"
    r"|\b[Ff]ail(?:ed|ure)? to (?:alloc|reserve|map)|\b(?:cannot|could not|unable to) alloc"
)
"""Signs of a failure in a line that is no exception's; a metric called error has a number behind it."""


def last_words(lines: Sequence[str], *, with_lines_before: bool = True) -> tuple[str, str] | None:
    """Return `other_error`, `memory_words` or `incomplete` with the line that shows it; None for no sign of a failure.

    An error is not called another one where one of the last lines, `with_lines_before`, names a lack of memory.

    >>> last_words(["Traceback (most recent call last):", "KeyError: 3"])
    ('other_error', 'KeyError: 3')
    """
    bodies = [part(line).body for line in lines]
    if (cut := _cut_traceback(bodies)) is not None and not any(_names_memory(body) for body in bodies):
        return "incomplete", cut
    ended = [found for body in bodies if (found := _ENDED.match(body)) and "Warning" not in found[1]]
    own = [match for match in ended if not _LAUNCHER.match(match[1])]
    if ended:
        return _of_error((own or ended)[-1][1], bodies if with_lines_before else [])
    for line in reversed(lines):
        parted = part(line)
        if (parted.level == "error" or _FAILS.search(line)) and parted.body.strip():
            near = _lack_in(bodies if with_lines_before else [])
            named = parted.body if _MEMORY.search(parted.body) else near
            return ("memory_words", named.strip()[:300]) if named else ("other_error", parted.body.strip()[:300])
    return None


def _of_error(error: str, bodies: Sequence[str]) -> tuple[str, str]:
    """Return the kind of an error, and the line that shows it: its own, or one of `bodies` that names memory."""
    if _OF_CODE.match(error):
        left_out = next((each for each in bodies if _LEFT_OUT.search(each)), None)
        return ("memory_words", left_out.strip()[:300]) if left_out else ("other_error", error)
    if _MEMORY.search(error) or _OF_MEMORY.match(error):
        return "memory_words", error
    near = _lack_in(bodies)
    return ("memory_words", near.strip()[:300]) if near else ("other_error", error)


def _lack_in(bodies: Sequence[str]) -> str | None:
    """Return the last of the lines near the end that names a lack of memory."""
    return next((each for each in reversed(bodies[-_NEAR:]) if _LACK.search(each) and not _DENIED.search(each)), None)


_LAUNCHER = re.compile(
    r"(?:subprocess\.CalledProcessError|torch\.multiprocessing\.spawn\.Process\w+Exception|SystemExit|KeyboardInterrupt)\b"
)
"""Errors of a launcher, which follow from one further up."""


_AFTER_CODE = re.compile(r"(?<=\) )([A-Z]\w{2,40}Error: [^\n]{1,300})")
"""An error behind the line of code that raised it."""


def titled_error(text: str) -> str | None:
    """Return the error that the title of a report names, if it is one.

    >>> titled_error("# KeyError: 'model'"), titled_error("# return src.take(index) IndexError: out of range")
    ("KeyError: 'model'", 'IndexError: out of range')
    """
    title = text.lstrip().partition("\n")[0].strip()
    match = (_ENDED.match(title.lstrip("# ")) or _AFTER_CODE.search(title)) if title.startswith("#") else None
    return match[1] if match and ":" in match[1] and "Warning" not in match[1] else None


_FAILED = re.compile(
    r"\b(?:fail(?:s|ed|ure)?|errors?|crash(?:es|ed)?|killed|aborted|stuck)\b|报错|失败|崩溃|エラー|失敗|落ち",
    re.IGNORECASE | re.ASCII,
)


BELOW = re.compile(
    r"(?m)^(?:wandb: .*|srun: error: .*|.*\bexit(?:ed with)? (?:exit )?code -?\d+\b.*|\S{0,60} ?\S{0,60}[$#>%] ?)$"
)
"""What a tracker, a launcher or a shell prints below any failure."""
_ERRS = re.compile(
    r"\b[A-Z]\w*(?:Error|Exception):|\b(?:CUDA|HIP) [Ee]rror\b|\b[Ee]rror: |\bERROR\b|\bFATAL\b"
    r"|\b[Rr]esource exhausted:|\b[Ee]xecution failed:|\buncaught exception\b"
)


def error_at_end(text: str) -> str | None:
    """Return the last line of a log if it tells of an error, of which the rest may be missing.

    >>> error_at_end("step 1\\n`(EngineCore) ValueError: To serve at least one"), error_at_end("0 errors\\n")
    ('`(EngineCore) ValueError: To serve at least one', None)
    """
    last = BELOW.sub("", text).rstrip().rpartition("\n")[2].strip()
    return last if _ERRS.search(last) else None


def tells_of_failure(text: str) -> bool:
    """Return True for a report that has a title and tells of a failure.

    >>> tells_of_failure("# Failed to launch the server"), tells_of_failure("step 1: error 0.3")
    (True, False)
    """
    return text.lstrip().startswith("# ") and bool(_FAILED.search(text))


_REPORTED = re.compile(
    r"\b(?:runs?|ran|running) out of (?:the )?(?:cuda|gpu|device) (?:memory|mem|ram)\b"
    r"|\b(?:cuda|gpu|hip|device|video|graphics?(?: card)?)\W{0,3}(?:\w+ )?(?:runs?|ran|running|goes|went|is|was)?[ -]*"
    r"(?:out[ -]{1,3}of[ -]{1,3}(?:v?ram|mem)|oom\b(?![=:] ?[\d.]))"
    r"|\bOutOfMemoryError\b|\bout[ -]of[ -](?:cuda|gpu|video|device|graphics)[ -](?:memory|mem|ram)"
    r"|\b(?:gpus?|cuda|vram) ?(?:memory|mem)?\b[^.\n]{0,20}\b(?:memory )?leak"
    r"|^# [^\n]{0,80}\b(?:absurd|insane|huge|excessive|crazy|abnormal|enormous|too (?:high|much|large)) (?:\w+ )?"
    r"(?:memory|vram) (?:usage|use|consumption|requirements?)\b"
    r"|^# [^\n]{0,60}\b(?:cuda|gpu) memory (?:issues?|problems?|errors?)\b"
    r"|\b(?:found|got|gets?|have|had|faced?|encounter\w*|hit) (?:a |an |the |this )?(?:cuda|gpu) memory errors?\b"
    r"|\bout of vram\b|\bvram (?:oom|is full)|\b(?:cuda|gpu) memory (?:usage )?(?:explod|blow)\w*"
    r"|\bOOM\b(?! ?kill|[=:] ?[\d.])|(?:显存|显卡的?内存)(?:不足|不够|溢出|爆)|爆(?:显存|显卡内存)"
    r"|GPU ?\d?.{0,6}(?:内存|显存)(?:不足|不够)|(?:VRAM|GPU ?メモリー?) ?(?:が)?(?:不足|足り)",
    re.IGNORECASE | re.ASCII,
)
"""A person's words for device memory that ran out."""
_REPORTED_ANYHOW = re.compile(_REPORTED.pattern + r"|\bout[ -]of[ -]memory\b", re.IGNORECASE | re.ASCII)
_OF_DEVICE = re.compile(
    r"\b(?:gpus?|cuda|vram|[rg]tx ?\d\w*|(?:\dx ?)?[ahv]\d00|graphics card|nvidia|nppexception|managedcuda"
    r"|opencl)\b|\bPYTORCH_(?:CUDA_|HIP_)?ALLOC|CUDA_VISIBLE|\bnproc[-_]per[-_]node|\baccelerate launch\b|\bdeepspeed\b"
    r"|\bdevice: ?cuda|\bdispatch_model\(|\bmodel\.to\((?:self\.)?(?:args\.)?device\b",
    re.IGNORECASE | re.ASCII,
)
"""Signs of a card in a report, with which memory that ran out is mostly the card's."""
_ADVICE = re.compile(
    r"\b(?:how to|avoid\w*|prevent\w*|tips?|guide|faq|troubleshoot\w*|reduc\w+|handl\w+|fix(?:es|ed)?|if|may)\b"
    r"|避|防|対処",
    re.IGNORECASE | re.ASCII,
)
_OF_JOB = re.compile(
    r"\b(?:slurm\w*|sbatch|cgroups?|kubernetes|k8s)\b[^\n]{0,60}?\b(?:OOM\b|out[- ]of[- ]memory)"
    r"|(?:\bOOM\b|out[- ]of[- ]memory)[^\n]{0,40}?\b(?:slurm\w*|sbatch|cgroups?|kubernetes|k8s)\b",
    re.IGNORECASE | re.ASCII,
)
"""A person's words for a job or a container that used up the host's memory it may have."""


def is_of_job(line: str) -> bool:
    """Return True for a line on a job or a container that used up the host's memory it may have.

    >>> is_of_job("Training ends with a slurm OOM error"), is_of_job("OOM on my GPU")
    (True, False)
    """
    return bool(_OF_JOB.search(line))


_OF_HOST = re.compile(
    r"(?<!V)\bRAM\b.{0,80}\b(?:OOM|kill|full)|\bkilled by (?:the )?(?:system|kernel|os)\b", re.IGNORECASE | re.ASCII
)
"""A line on the host's memory, whatever else it names."""


def _denies(line: str) -> bool:
    """Return True for a line that says that memory did not run out."""
    return bool(_DENIED.search(line)) or bool(_OF_HOST.search(line) and not re.search(r"GPU|VRAM", line))


_DENIED = re.compile(
    r"\b(?:not|no|isn't|never|without)\b[^.:;,\n]{0,12}\b(?:out[ -]of[ -](?:(?:\w+ )?memory|v?ram\b)|OOM\b)"
    r"|\b(?:no|without)\b[^.\n]{0,20}\bleak"
    r"|(?<!\bnot )(?<!\bno )(?<!n't )enough (?:V?RAM|memory)\b"
    r"|(?:显存|显卡的?内存)(?:没问题|足够|充足|够用)",
    re.IGNORECASE | re.ASCII,
)
"""Words for memory that did not run out."""
_TITLE_LINES = 4
"""Lines at a text's beginning in which a person says what happened."""


def reported_in(lines: Sequence[str]) -> str | None:
    """Return the line, among the first of a report, that says that device memory ran out; None if none does.

    >>> reported_in(["# GPU out of memory", "", "It happens in the third epoch."])
    'GPU out of memory'
    """
    first = [each for each in lines if each.strip()][:_TITLE_LINES]
    words = _REPORTED if not any(map(_OF_DEVICE.search, lines)) else _REPORTED_ANYHOW
    found = next(
        (
            line
            for line in first
            if words.search(line) and not (_ADVICE.search(line) or is_of_job(line) or _denies(line))
        ),
        None,
    )
    return shortened(sentence_in(found.strip(" #*\t"))) if found else None


_SENTENCE_ENDS = re.compile(r"(?<=[^\d\W]{2}[.!?]) +(?=[A-Z#*])|(?<=[。！？])")
_LONG_LINE = 120


def sentence_in(line: str) -> str:
    """Return the sentence of a long line that names a lack of memory, without its full stop.

    >>> sentence_in("I trained it for days on eight cards, with a small batch and with LoRA. " * 2 + "It is OOM now.")
    'It is OOM now'
    """
    if len(line) > _LONG_LINE:
        line = next((each for each in _SENTENCE_ENDS.split(line) if _ANYHOW.search(each)), line)
    return line.strip().removesuffix(".")


def told_in(line: str) -> str:
    """Return the sentence of a person's line that names a lack of memory, on one line and without its mark.

    >>> told_in("I have a small card. It failed   because of out of CUDA memory.")
    'It failed because of out of CUDA memory'
    """
    said = _part_with_lack(_SENTENCE_ENDS.split(line), line)
    if len(said) > _LONG_LINE:
        said = _part_with_lack(_CLAUSES.split(said), said)
    return " ".join(said.split()).strip(" #*").removesuffix(".")


def sentence_at(text: str, place: int) -> str:
    """Return the sentence at a place of a report, or its clause if the sentence is long.

    >>> sentence_at("It runs well. Memory grows with each step. Then it fails.", 20)
    'Memory grows with each step'
    """
    start = text.rfind("\n", 0, place) + 1
    line = text[start:].partition("\n")[0]
    found = _piece_at(_SENTENCE_ENDS, line, place - start)
    if len(found[0]) > _LONG_LINE:
        found = _piece_at(_CLAUSES, found[0], place - start - found[1])
    return shortened(" ".join(found[0].split()).strip(" #*>`").rstrip(".。"))


def _piece_at(ends: re.Pattern[str], text: str, place: int) -> tuple[str, int]:
    """Return the piece between two ends at a place, and where it begins."""
    starts = [0, *(match.end() for match in ends.finditer(text) if match.end() <= place)]
    begin = starts[-1]
    end = next((match.start() for match in ends.finditer(text) if match.start() > place), len(text))
    return text[begin:end], begin


_CLAUSES = re.compile(r"[,;:)] (?:but |and |so )?")


def _part_with_lack(parts: Sequence[str], otherwise: str) -> str:
    return next((each for each in parts if _ANYHOW.search(each) or _REPORTED.search(each)), otherwise)


_LONGEST = 200
"""Characters of a person's words that are quoted."""


def shortened(words: str) -> str:
    """Return the beginning of a long text, up to a whole word.

    >>> shortened("memory " * 40)[-12:]
    'ory memory …'
    """
    return words if len(words) <= _LONGEST else words[: _LONGEST - 2].rpartition(" ")[0] + " …"


def is_told(line: str) -> bool:
    """Return True for a sentence of a person's on device memory that ran out.

    >>> is_told("While saving the model, it runs out of CUDA memory in each run."), is_told("cudaMalloc failed: OOM")
    (True, False)
    """
    return bool(_REPORTED.search(line)) and len(line.split()) > _WORDS_OF_SENTENCE and not quotes_error(line)


_WORDS_OF_SENTENCE = 8
_QUOTED = re.compile(
    r"\w(?:Error|Exception)\b ?:|`[^`]{12,}`|\b[\w./-]+\.(?:cu|cuh|cpp|cc|c|h|py|rs|go):\d+|\b[Ee]rror(?: code)?:"
)
"""An error's own words within a line of a person's."""


def quotes_error(line: str) -> bool:
    """Return True if a line of a report holds the error's own words, so that they are not missing.

    >>> quotes_error("RuntimeError: Insufficient VRAM in split"), quotes_error("GPU out of memory in epoch 3")
    (True, False)
    """
    return bool(_QUOTED.search(line))


_CHAPTER = re.compile(
    r"^#+ .*(?:\b(?:faq|guide|tips?|troubleshoot\w*|common|how to)\b|対処|よくある)"
    r"|^(?:try|use|reduce|lower|set|if you) ",
    re.IGNORECASE | re.ASCII,
)


def advises(lines: Sequence[str]) -> bool:
    """Return True if a line is the heading of a document, or an instruction.

    >>> advises(["## CUDA out of memory", "Try a smaller batch."]), advises(["# CUDA out of memory on a T4"])
    (True, False)
    """
    return any(_CHAPTER.search(line) or (line.startswith("#") and _ADVICE.search(line)) for line in lines)


_ANYHOW = re.compile(
    r"out[\s_-]{0,3}of[\s_-]{0,3}(?:(?:device|host|gpu|video|shared|cuda)[\s_-]{0,3})?mem|OutOf(?:Gpu|Device|Host)?Mem"
    r"|\bOOM\b(?![=:] ?[\d.])|bad[\s_]alloc|(?:can ?not|could not|unable to|fail(?:ed|ure)?(?: to)?|no more) ?alloc"
    r"|alloc\w* (?:fail|error)|memory (?:exhausted|overflow|limit(?! ?(?:[=:]|(?:is|set|to|per)\b))|allocation"
    r"|is (?:full|not enough)|not enough)"
    r"|(?:insufficient|not? enough) .{0,20}memory|显存|显卡的?内存|内存不[足够]|メモリ(?:ー)?(?:が)?(?:不足|足り)",
    re.IGNORECASE | re.ASCII,
)
"""Words of any program, library or person for memory that ran out."""


_MEETS = re.compile(
    r"\b(?:I|we|it|and)\b[^.\n]{0,40}\b(?:get|gets|getting|got|hit|hits|facing|faced|encounter\w*|experienc\w*|see|saw|keeps?|ran|runs?|met|receive\w*)\b"
    r"[^.\n]{0,40}\b(?:out[ -]of[ -]memory|OOM)\b"
    r"|\buntil (?:it |I |we |the \w+ )?(?:gets? |goes |hits? |is |runs? )?(?:OOM|out[ -]of[ -]memory)\b"
    r"|\b(?:CUDA|GPU) out of memory\b[^.\n]{0,20}\b(?:even|although|despite)\b"
    r"|\b(?:this|that|which|it|code|script|command|call)\b[^.\n]{0,20}\b(?:throws?|threw|gives?|gave|raises?|raised|causes?"
    r"|caused|leads? to|results? in|ends? (?:up )?in|crash\w* with|fails? with|dies with)\b"
    r"[^.\n]{0,25}\b(?:out[ -]of[ -]memory|OOM)\b"
    r"|(?:张量|模型).{0,40}内存分配|(?:内存|显存)分配(?:错误|失败)"
    r"|\bfills? (?:up )?(?:the |my |all )?(?:whole |entire )?(?:GPU|VRAM|graphics card)\b"
    r"|\b(?:CUDA|GPU)(?: memory)? (?:will be|is|was|gets?|got|goes|went|runs?|ran) out of memory\b",
    re.IGNORECASE | re.ASCII,
)
"""A person's words for device memory that ran out in the own run."""


_SENTENCES = re.compile(r"(?<=[a-z\d)][.!?]) +(?=[A-Z])")


def met_in(lines: Sequence[str]) -> str | None:
    """Return the line in which a person tells that device memory ran out in the own run; None if none does.

    >>> met_in(["Trying 4K: CUDA out of memory even with 48GB VRAM"])
    'Trying 4K: CUDA out of memory even with 48GB VRAM'
    """
    if not any(map(_OF_DEVICE.search, lines)):
        return None
    sentences = (each for line in lines if _MEETS.search(line) for each in _SENTENCES.split(line))
    told = (
        each
        for each in sentences
        if _MEETS.search(each) and not re.search(r"(?<!even )(?<!as )\bif\b(?! [Ii]\b)", each)
    )
    found = next((line for line in told if not _denies(line)), None)
    return " ".join(found.split()).strip(" #*`")[:300] if found else None


def mentioned_in(lines: Sequence[str]) -> tuple[str, bool] | None:
    """Return the last line that names a lack of memory, and True if it is a card's; the last resort of all.

    >>> mentioned_in(["what():  sort failed: out of memory (CUDA)"])
    ('what(): sort failed: out of memory (CUDA)', True)
    """
    for line in reversed(lines):
        found = _ANYHOW.search(line)
        if (
            found
            and not is_of_job(line)
            and not _denies(line)
            and not (_ADVICE.search(line) and len(line) > len(found[0]) + _SHORT)
        ):
            text = " ".join(line.split()).strip(" #*`")
            is_device = bool(_OF_DEVICE.search(line) or re.search("显存|显卡的?内存", line))
            return text[:300], is_device or any(map(_OF_DEVICE.search, lines))
    return None


_RAM = re.compile(
    r"\b(?:low|not enough|insufficient|out of|max\w* out(?: the)?|all(?: of)?(?: the)?)"
    r" (?:(?:system|host|cpu|available) )*RAM\b"
    r"|\b(?:wo|does|do|ca)n'?t fit (?:in|into) (?:the )?(?:memory|RAM)\b"
    r"|\bRAM\b[^.\n]{0,30}\b(?:swap|SWAP)\b[^.\n]{0,30}\b(?:exhausted|full|used)"
    r"|\b(?:blow|eat|fill|us|exhaust)\w* (?:up )?(?:all )?(?:of )?(?:my|all|the whole|the entire)(?: the| my)?"
    r" (?:(?:system|host|cpu|available) )*RAM\b"
    r"|\b(?:us|tak|eat|fill|consum)\w* (?:up )?all (?:of )?(?:the |my )?\d+ ?[Gg][Bb] (?:of )?(?:RAM|ram)\b"
    r"|\b(?:explod|blow|eat|fill|exhaust)\w* (?:up )?(?:my|all|the whole|the entire) (?:the |my )?memory\b"
    r"(?![^.\n]{0,60}\b(?:GPU|VRAM|CUDA))"
    r"|(?<!V)\bRAM OOMs?\b|(?<!V)\bRAM usage (?:\w+ ){0,3}up ?to\b"
    r"|\bnot enough [^.\n]{0,30}\bRAM\b"
    r"|\bRAM (?:is |was |gets? )?(?:full|exhausted|overflow)|\bcrash\w* [^.\n]{0,30}\blow on memory"
    r"|(?:服务器|物理|系统|主机|运行)内存.{0,20}(?:爆|不足|不够|耗尽|占满)|内存爆满|(?:システム|ホスト|物理)メモリー?.{0,8}(?:不足|足り)"
    r"|\b(?:giv\w+|g[eo]t\w*|throws?|rais\w+|with) (?:a |an )?MemoryError\b|^#.{0,60}\bMemoryError\b"
)
"""A person's words for the host's memory that ran out."""
_HOSTS = (
    r"(?<!GPU )\b(?:(?:host|CPU|system|main|RAM) (?:memory|RAM)|RAM)\b(?: \([^)\n]{1,20}\))?"
    r"(?: usage| use| consumption| utili[sz]ation| footprint)?"
)
"""The host's memory in a person's words."""
_OF_CPU = re.compile(
    r"\bout[- ]of[- ](?:CPU|host|system|main)[- ](?:memory|RAM)\b|\b(?:CPU|host|system) (?:RAM |memory )?OOMs?\b"
    r"|\b(?:us|tak|eat|fill|consum|exhaust)\w* (?:up )?all (?:of )?(?:(?:my|the) )?"
    r"(?:(?:machine|system|host|computer)(?:'s)? )?(?:D?RAM|memory of the (?:machine|host|node|server))\b"
    r"|\bmemory \(not (?:the )?(?:GPU|VRAM)[^)\n]*\)[^.\n]{0,40}\b(?:full|out|exhausted)\b"
    rf"|{_HOSTS}(?: \w+){{0,4}}? (?:costs? too much|(?:increas|grow|climb|leak|explod|overflow)\w*|bl(?:ows?|ew) up"
    r"|ris(?:es|ing)|(?:is |was |gets? )?(?:exhausted|full|too high)\b|r[au]ns? out\b)"
    rf"|{_HOSTS}(?: \w+){{0,4}}? (?:reach|hit|fill|climb|exceed)\w*[^.\n]{{0,40}}\b(?:out of memory|OOM|crash|kill)"
    r"|\b(?:OOM|out of memory)\W{1,3}(?:(?:is |was )?(?:on|in|of|for) (?:the )?)?"
    r"(?:CPU|host|RAM)\b(?! ?(?:offload|and GPU|/ ?GPU|vs))"
    r"|\binsufficient \W?(?:(?:CPU|host|system)\W{1,2})?RAM\b|\bexceed\w* (?:the |my |its |our )?(?:\w+ )?RAM\b"
    r"|\bmemory leak\w*[^.\n]{0,20} (?:on|in|of|for) (?:the )?(?:(?:CPU|host|system|main) (?:RAM|memory)|RAM)\b"
    rf"|\b(?:too much|high|huge|excessive|insane|crazy) {_HOSTS}"
    r"|\bnot? (?:apparently )?(?:have )?(?:apparently )?enough memory to store the complete replay buffer"
    r"|(?:CPU|主机|系统|物理)内存(?:泄[漏露]|一直|不断|持续|逐渐|越来越)"
    r"|(?<!V)\bRAM is the bottleneck\b|\bmain memory usage\b[^.\n]{0,40}\b(?:increas|grow|ris)\w*",
    re.IGNORECASE,
)
"""Words for the host's memory that ran out, which leave no doubt."""
_KILLED = re.compile(
    r"^#[^\n]{0,40}\bkilled (?:while|when|during|after|on|at)\b|[\"'“`]killed[\"'”`.]"
    r"|\b(?:was|gets?|got|is|being) killed\b|\b(?:data ?)?loader workers? (?:\w+ )?killed\b"
    r"|\bkilled by (?:the )?(?:daemon|system|kernel|os|cluster|scheduler)\b|\b(?:killed|died|ended) with signal -?9\b",
    re.IGNORECASE | re.ASCII,
)
"""A person's words for a process that the kernel ended."""


def host_words_in(lines: Sequence[str]) -> tuple[str, str] | None:
    """Return the kind of failure of the host's memory that a person's words name, and the line.

    >>> host_words_in(["It crashes due to low RAM."])
    ('host_memory_error', 'It crashes due to low RAM.')
    """
    kinds = (("host_killed", _OF_JOB), ("host_memory_error", _OF_CPU), ("host_memory_error", _RAM))
    for kind, words in (*kinds, ("host_killed", _KILLED)):
        for line in lines:
            if words.search(line) and not (_ADVICE.search(line) and "VRAM" in line):
                told = _SENTENCE_ENDS.split(line) if len(line) > _LONG_LINE else [line]
                said = next(filter(words.search, told), line)
                return kind, " ".join(said.split()).strip(" #*")[:300]
    return None


def cpu_words_in(lines: Sequence[str]) -> tuple[str, str] | None:
    """Return the kind and the line of a report that names the host's memory beside the words for a lack of memory.

    >>> cpu_words_in(["# out-of-memory in the second epoch", "It is an out-of-CPU-memory error."])
    ('host_memory_error', 'It is an out-of-CPU-memory error.')
    """
    return host_words_in([line for line in lines if _OF_CPU.search(line)])


_SHORT = 30
"""Characters besides the words, up to which a line with an `if` or a `fix` is no advice."""


def _names_memory(body: str) -> bool:
    """Return True for the last line of a traceback that names memory: another rank's traceback may be cut off."""
    match = _ENDED.match(body)
    return bool(match and "Warning" not in match[1] and not _OF_CODE.match(match[1]) and _MEMORY.search(match[1]))


def _cut_traceback(bodies: Sequence[str]) -> str | None:
    """Return the class that a notebook's head names, or an empty text, if the last traceback lacks its last line."""
    named, start = "", None
    for at in range(len(bodies) - 1, -1, -1):
        if head := _HEAD.search(bodies[at]):
            named, start = head["named"] or "", at + 1
            break
    after = [body for body in bodies[start or 0 :] if body.strip()]
    begun = bodies[-1] if bodies and _BEGUN.fullmatch(bodies[-1]) else None
    if start is None:
        return "" if len(after) >= 2 and _FRAME.match(after[-2]) and after[-1].startswith("    ") else None
    if any(_LAST_LINE.match(body) and not _FRAME.match(body) for body in _endings(bodies[start:]) if body != begun):
        return None
    return named


def _endings(behind: Sequence[str]) -> Iterator[str]:
    """Yield the lines behind a traceback's head that may end it: any up to an empty line behind Python's frames.

    What a person writes below the traceback, with an empty line before it, ends none; an error's name does.
    """
    has_frames = is_below = False
    for body in behind:
        has_frames = has_frames or body.lstrip().startswith('File "')
        is_below = is_below or (has_frames and not body.strip())
        if body.strip() and (not is_below or _ENDED.match(body)):
            yield body
