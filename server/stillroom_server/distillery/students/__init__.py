"""Students: how each kind begins, and what makes it smaller while it learns.

settings    who learns, and what is taken from it               make        a student from settings and a teacher
towers      layers left out, small BERTs from scratch           static      a table of token vectors
shaped      a BERT whose layers differ, or with a wider output  export      any of them as a device runs it
importance  what each head and neuron matters                   pruning     what matters least is removed
magnitude   small weights become zero and stay so               iterate     both in steps, with training in between
vocabulary  tokens that no text uses are dropped                size        parameters, bytes and arithmetic
"""
