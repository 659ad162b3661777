"""Video-Holmes: reasoning over clues in suspense films.

Source: https://github.com/TencentARC/Video-Holmes (test_Video-Holmes.json 1,837 rows of 270 films;
train_Video-Holmes.json 1,551), arXiv 2505.21374. Licence: Apache-2.0, academic use; videos from YouTube.
Columns: video ID, Question ID, Question Type (SR, IMC, TCI, TA, MHR, PAR, CTI), Question, Options {A … F},
Answer, Explanation.
Metric: accuracy over rows, per type besides; chance is 16.7%.
Traps: official letters are read from the first that occurs ("B. A man" is A there). 8 rows repeat an option's
text: counted. Training and test share films, perhaps: check the videos before using both.
"""

from veripo_trl.sources.record import one_of, text

NAME = "Video-Holmes"
VIDEOS = "videos_cropped/<video ID>.mp4"


def convert(record: dict, *, file: str) -> list[dict | str]:
    options = {letter: option for letter, option in sorted(record["Options"].items()) if option}
    counted: list[dict | str] = []
    if len(set(options.values())) < len(options):
        counted.append("said: two of its options are the same text")
    row = {
        "question_id": f"{record['video ID']}-{record['Question ID']}",
        "problem": text(record, "Question"),
        "options": [f"{letter}. {option}" for letter, option in options.items()],
        "problem_type": "multiple choice",
        "solution": one_of(record, "Answer", list(options)),
        "videos": [f"videos_cropped/{record['video ID']}.mp4"],
        "categories": {"type": text(record, "Question Type")},
    }
    return [*counted, row]
