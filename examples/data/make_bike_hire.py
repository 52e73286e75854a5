"""Makes bike_hire.csv: an invented bicycle station, one row a day, always the same.

Run it with ``python make_bike_hire.py`` in this folder. README.md says how the values
relate, so that what an analysis finds can be checked against what was put in.
"""

from __future__ import annotations

import csv
import io
import math
import random
from datetime import date, timedelta
from pathlib import Path

DAYS = 365
FIRST_DAY = date(2025, 1, 1)
SEED = 20_250_101
HEADER = (
    "date",
    "weekday",
    "temperature_c",
    "rain_mm",
    "wind_kmh",
    "hires",
    "mean_ride_min",
    "repairs",
    "remark",
)
SPECIAL_DAYS = {
    date(2025, 5, 17): ("city marathon", 2.6),
    date(2025, 7, 12): ("street festival", 2.3),
    date(2025, 9, 20): ("car-free Saturday", 2.8),
    date(2025, 10, 4): ("storm warning", 0.1),
}


def make_rows() -> list[list[str]]:
    """Give the header and the rows."""
    # Only random() is promised to give the same numbers in every Python version.
    draw = random.Random(SEED).random  # noqa: S311

    def noise(spread: float) -> float:
        return spread * (sum(draw() for _ in range(12)) - 6)

    rows = [list(HEADER)]
    for number in range(DAYS):
        day = FIRST_DAY + timedelta(days=number)
        season = -math.cos(2 * math.pi * (number - 20) / 365)
        temperature = 10.5 + 9 * season + noise(3.2)
        rain = max(0.0, -6 * math.log(1 - draw()) - 3) if draw() < 0.6 else 0.0
        wind = max(1.0, 14 + noise(5) + 0.4 * rain)
        is_weekend = day.weekday() >= 5
        expected = (150 + 9.5 * temperature) * (0.8 if is_weekend else 1.0) * 0.965**rain
        remark, factor = SPECIAL_DAYS.get(day, ("", 1.0))
        hires = max(0, round(factor * (expected + noise(28))))
        ride = (19 if is_weekend else 13) + 0.15 * temperature + noise(1.4)
        repairs = sum(draw() < 0.008 for _ in range(hires))
        # The sensors of the station fail now and then.
        temperature_cell = "" if draw() < 0.02 else f"{temperature:.1f}"
        wind_cell = "n/a" if draw() < 0.03 else f"{wind:.0f}"
        rows.append(
            [
                day.isoformat(),
                day.strftime("%a"),
                temperature_cell,
                f"{rain:.1f}",
                wind_cell,
                str(hires),
                f"{ride:.1f}",
                str(repairs),
                remark,
            ]
        )
    return rows


def make_csv() -> str:
    """Give the file's text."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(make_rows())
    return text.getvalue()


if __name__ == "__main__":
    Path(__file__).with_name("bike_hire.csv").write_text(make_csv(), encoding="utf-8")
