"""An aggregate of our own: everything that has the greatest score."""

from fcluster import Aggregate


def greatest(by, of):
    """`of(value)` of all values with the greatest `by(value)`, sorted: several, if they are equal."""

    def add(kept, value):
        score = by(value)
        if not kept or score > kept[0]:
            return [score, [of(value)]]
        if score == kept[0]:
            kept[1].append(of(value))
        return kept

    return Aggregate("greatest", init=list, add=add, result=lambda kept: sorted(kept[1]))
