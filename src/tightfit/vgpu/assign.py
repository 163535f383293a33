"""Assignment of answers onto torch's modules and classes."""


def assign(*targets: object, **answers: object) -> None:
    """Set each answer as an attribute of all targets."""
    for target in targets:
        for name, answer in answers.items():
            setattr(target, name, answer)
