"""Values of a loop's iterations that may decide sizes: an iteration with a value that never ran has to run.

A value that changes too often for that runs only where it is larger, or smaller, than ever before.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable

from tightfit.vgpu.inlined_loop import HOLDS

Values = dict[str, object]
"""Values of watched expressions by their keys."""
Seen = set[frozenset[tuple[str, object]]]


class WatchedValues:
    """The watched values of one loop while its iterations are passed over."""

    def __init__(
        self,
        seen: Seen | None = None,
        *,
        is_on: bool = True,
        only_extremes: bool = False,
        grows: bool = False,
        has_seldom: bool = False,
        is_outer: bool = False,
    ) -> None:
        """`seen` has the values of iterations that ran, and takes those of the next.

        `is_on`: sizes are watched, not conditions alone. `only_extremes`: only the largest and the smallest count.
        `grows`: a size changed before, so that what runs seldom may come with a larger one. `has_seldom`: sizes are
        read behind conditions. `is_outer`: it has training loops in it, and values that change each time count, too.
        """
        self._seen: Seen = set() if seen is None else seen
        self.is_on, self.only_extremes, self.grows, self.is_outer = is_on, only_extremes, grows, is_outer
        self.looks_ahead = only_extremes or grows or has_seldom or is_outer
        self.sizes: Values = {}
        """Values in the iteration that ran before any is passed over."""
        self.conditions: Values = {}
        """Conditions that always came out as they do now."""
        self.has_new_size = False
        """True if an iteration has a new size."""
        self._chosen: frozenset[int] | None = None
        """Iterations to run, by the number that were passed over before; None if any new value counts."""
        self._read: frozenset[str] = frozenset()
        """Keys of the values that this iteration read."""
        self._changing: set[str] = set()
        """Keys of those that change each time."""
        self._seldom: list[str] = []
        """Conditions that do not hold in the iteration that ran."""
        self._together: defaultdict[int, list[frozenset[tuple[str, object]]]] = defaultdict(list)
        """For iterations to run for a size under such a condition, both."""

    def start(self, steady: Values, ran: Collection[int], found: Values) -> None:
        """Take the values `found` in the iteration that ran, and those of them that do not change each time.

        `ran` are lines that ran.
        """
        self._read = frozenset(found)
        changing = found.keys() - steady.keys() if self.is_outer else set[str]()
        self._changing = {key for key in changing if not key.startswith(HOLDS)}
        self._seen |= {frozenset({(key, found[key])}) for key in self._changing}
        conditions = {key: value for key, value in steady.items() if key.startswith(HOLDS)}
        self.sizes = {key: value for key, value in steady.items() if not key.startswith(HOLDS)}
        self._seen |= {frozenset({each}) for each in conditions.items()}
        self._seldom = [key for key, value in conditions.items() if value is False] if self.grows else []
        held = (key for key in conditions if int(key.removeprefix(HOLDS).split(":")[0]) in ran)
        self._seen |= {frozenset({(key, True)}) for key in held}
        self.conditions = {
            key: value for key, value in conditions.items() if frozenset({(key, not value)}) not in self._seen
        }
        self._seen.add(frozenset(self.sizes.items()))

    def choose(self, ahead: Iterable[Values]) -> None:
        """Let those of the next iterations run in which a value is larger, or smaller, than in any that ran.

        And those in which it is so under a condition that holds seldom.
        """
        alone = {key: Extremes(self._ran(key)) for key in (*self.sizes, *self._changing)}
        together: dict[tuple[str, str], Extremes] = {}
        for number, found in enumerate(ahead):
            held = [key for key in self._seldom if found.get(key) is True]
            for key, value in found.items():
                if key in alone or not (key in self._read or key.startswith(HOLDS)):
                    alone.setdefault(key, Extremes(self._ran(key), takes_first=True)).note(value, number)
            for size in self.sizes.keys() & found.keys():
                for condition in held:
                    if (size, condition) not in together:
                        together[size, condition] = Extremes(self._ran(size, condition), takes_first=True)
                    together[size, condition].note(found[size], number)
        for size in alone.keys() - self.sizes.keys():  # read behind conditions alone
            for number, value in alone[size].chosen().items():
                self._together[number].append(frozenset({(size, value)}))
        if self.only_extremes:
            self._chosen = frozenset(number for size in self.sizes for number in alone[size].chosen())
        for (size, condition), each in together.items():
            for number, value in each.chosen().items():
                self._together[number].append(frozenset({(size, value), (condition, True)}))

    def _ran(self, size: str, condition: str = "") -> list[object]:
        """Return the values of a size in iterations that ran, or in those of them that were chosen for a condition."""
        held = {(condition, True)} if condition else set[tuple[str, object]]()
        return [value for values in self._seen if held <= values for key, value in values if key == size]

    def has_aim(self) -> bool:
        """Return True if some iteration may have to run."""
        return bool(self.sizes or self.conditions or self._together)

    def lines(self) -> list[int]:
        """Lines of the values that may decide sizes, as the loop's statements are moved."""
        places = (key.split(":") for key in self.sizes)
        return sorted({int(offset) + int(line) for offset, line, *_ in places})

    def has_turned(self, found: Values) -> bool:
        """Return True for an iteration in which a condition comes out otherwise than ever before."""
        turned = {key for key, value in self.conditions.items() if found.get(key, value) != value}
        self._seen |= {frozenset({(key, found[key])}) for key in turned}
        return bool(turned)

    def has_to_run(self, number: int, found: Values) -> bool:
        """Return True for an iteration with new values, before which `number` were passed over."""
        if number in self._together:
            self._seen.update(self._together[number])
            return True
        if all(found.get(key, value) == value for key, value in self.sizes.items()):
            return False
        values = frozenset((key, found.get(key, value)) for key, value in self.sizes.items())
        if values in self._seen or not (self._chosen is None or number in self._chosen):
            return False
        self._seen.add(values)
        self.has_new_size = True
        return True


class Extremes:
    """The largest and the smallest value of an expression in the iterations ahead."""

    def __init__(self, ran: Iterable[object], *, takes_first: bool = False) -> None:
        """`ran` are its values in iterations that ran. `takes_first`: without any, the first one ahead counts."""
        self._takes_first = takes_first
        self._largest: object = None
        self._smallest: object = None
        self._at: dict[bool, int] = {}
        """Iterations with the largest value (True) and the smallest, if they exceed those that ran."""
        for value in ran:
            self.note(value, -1)
        self._at.clear()

    def note(self, value: object, number: int) -> None:
        """Take the value in an iteration; those that cannot be compared count as alike."""
        if self._largest is None:
            self._largest = self._smallest = value
            if self._takes_first:
                self._at[True] = number
        if _exceeds(value, self._largest):
            self._largest, self._at[True] = value, number
        if _exceeds(self._smallest, value):
            self._smallest, self._at[False] = value, number

    def chosen(self) -> dict[int, object]:
        """Return these iterations and their values."""
        return {number: self._largest if is_largest else self._smallest for is_largest, number in self._at.items()}


def _exceeds(one: object, other: object) -> bool:
    match one, other:
        case (int(), int()):
            return one > other
        case (tuple(), tuple()):
            return len(one) == len(other) and any(map(_exceeds, one, other))
    return False
