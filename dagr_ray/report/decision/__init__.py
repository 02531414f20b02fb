"""What a study may say, as pure functions over arrays: no folders, no text of other people, NumPy and SciPy alone.

* ``estimates``   a paired gain with its standard error over queries and seeds, and intervals of it
* ``outcomes``    five outcomes, the smallest volume that is enough, and a sentence for each
* ``power``       what a test set can see before anything is spent
* ``sequential``  intervals that stay valid when a person looks after each rung, or as judgements come in
* ``crossfit``    the best arm, chosen on some queries and seeds and estimated on the others
* ``curves``      gain over volume: families, fits of every resample, bands, the error on a rung that was held out, dips
* ``purchase``    how many queries to buy, at what price and risk; generators at equal dollars
"""

WORTH, ALPHA = 0.01, 0.05  # the smallest gain worth having, and the share of studies that may claim what is not so
