//! Medians and spreads, and how numbers are written in tables.

/// The median of figures with the least and the greatest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The one in the middle, or halfway between the two that are.
    pub median: f64,
    /// The least.
    pub least: f64,
    /// The greatest.
    pub most: f64,
}

impl Spread {
    /// Of these, if there is any.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_unstable_by(f64::total_cmp);
        let (least, most) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = match values.len() % 2 {
            1 => values[middle],
            _ => f64::midpoint(values[middle - 1], values[middle]),
        };
        Some(Self { median, least, most })
    }

    /// The median, and in brackets the least and the greatest, as `write` writes each.
    pub fn cell(&self, write: impl Fn(f64) -> String) -> String {
        format!("{} [{} .. {}]", write(self.median), write(self.least), write(self.most))
    }
}

/// A figure: three digits or so, with `k` and `M` for thousands and millions.
pub fn number(value: f64) -> String {
    match value {
        value if value >= 1e6 => format!("{:.2} M", value / 1e6),
        value if value >= 1e4 => format!("{:.1} k", value / 1e3),
        value if value >= 100.0 => format!("{value:.0}"),
        value => format!("{value:.2}"),
    }
}

/// A ratio.
pub fn ratio(value: f64) -> String {
    format!("{value:.2}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_has_the_middle_and_both_ends() {
        assert_eq!(Spread::of([]), None);
        assert_eq!(Spread::of([3.0, 1.0, 2.0]), Some(Spread { median: 2.0, least: 1.0, most: 3.0 }));
        let four = Spread::of([4.0, 1.0, 2.0, 9.0]).unwrap();
        assert_eq!(four, Spread { median: 3.0, least: 1.0, most: 9.0 });
        assert_eq!(four.cell(ratio), "3.00 [1.00 .. 9.00]");
    }

    #[test]
    fn numbers_are_short() {
        for (value, expected) in
            [(0.126, "0.13"), (99.0, "99.00"), (162.4, "162"), (12_345.0, "12.3 k"), (2_504_000.0, "2.50 M")]
        {
            assert_eq!(number(value), expected);
        }
    }
}
