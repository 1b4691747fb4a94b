"""The distillery: any strong teacher becomes the best small query tower or reranker for a device, on public text only.

    data          what is learned from: public text, synthetic queries, hard negatives         `data/`, kept as `Lessons`
    teachers      who says what is right: scores of (query, passages), and vectors             `teachers/`
    students      who learns: towers, static tables, late interaction, rerankers               `students/`
    architecture  which shape of a student is best within bounds, searched for                 `architecture/`
    losses        how far a student is from its teachers, composed by weights and schedules    `losses/`
    compress      what makes it smaller afterwards, and checks that it still runs              `compress/`

A recipe (`recipe.py`) names one of each; `run.py` runs its stages. Trainers, losses and miners are those of Sentence
Transformers wherever it has them.
"""
