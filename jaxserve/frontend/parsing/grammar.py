"""x"""
from dataclasses import dataclass
@dataclass(frozen=True, slots=True)
class Tool:
    """x"""
def tool_grammar() -> str:
    """x"""
    return ""
