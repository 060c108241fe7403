//! Log probabilities of one row of logits: of one id, its rank, and of the most likely ids. Pure. Called by
//! [`crate::sampler`] for tokens that are drawn, and by the leader for tokens of prompts.

use backend::Drawn;
use backend::draw::{greatest, not_finite};

/// How likely a model holds one token to be at its place. Natural logarithms, of the logits as the model gave them.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    /// Of the token.
    pub logprob: f32,
    /// 1: no id is more likely.
    pub rank: u32,
    /// The most likely ids, most likely first; among equals the lowest id.
    pub top: Vec<(u32, f32)>,
}

/// The score of `id` in a row of finite logits, one per vocabulary id, with the `top` most likely ids.
pub fn score(logits: &[f32], id: u32, top: usize) -> Score {
    let max = greatest(logits);
    let sum: f64 = logits.iter().map(|&x| (f64::from(x) - f64::from(max)).exp()).sum();
    let norm = f64::from(max) + sum.ln();
    let logprob = |id: u32| (f64::from(logits[id as usize]) - norm) as f32;
    let rank = 1 + logits.iter().filter(|x| **x > logits[id as usize]).count() as u32;
    let wanted = top.min(logits.len());
    let order = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let mut ids: Vec<u32> = if wanted > 0 { (0..logits.len() as u32).collect() } else { Vec::new() };
    if wanted > 0 && wanted < ids.len() {
        ids.select_nth_unstable_by(wanted, order);
    }
    ids.truncate(wanted);
    ids.sort_unstable_by(order);
    Score { logprob: logprob(id), rank, top: ids.into_iter().map(|id| (id, logprob(id))).collect() }
}

/// The scores of `tokens`, consecutive ones of a prompt whose first has the position `start`, in the rows of the tokens
/// before them. Errors name what is no number.
pub(crate) fn scores(rows: &[Drawn], tokens: &[u32], start: usize, top: usize) -> Result<Vec<Score>, String> {
    if rows.len() != tokens.len() {
        return Err(format!("the step gave {} rows of logits for {} tokens", rows.len(), tokens.len()));
    }
    let row = |(i, (row, id)): (usize, (&Drawn, &u32))| match row {
        Drawn::Logits(logits) => match not_finite(logits) {
            Some((id, value)) => Err(format!("logit of id {id} at position {} is {value}", start + i)),
            None => Ok(score(logits, *id, top)),
        },
        Drawn::Token(_) | Drawn::NotFinite { .. } => Err(format!("no logits at position {}", start + i)),
    };
    rows.iter().zip(tokens).enumerate().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_count_what_is_likelier_and_equals_share_one() {
        let logits = [1.0, 3.0, 3.0, 2.0];
        let ranks: Vec<u32> = (0..4).map(|id| score(&logits, id, 0).rank).collect();
        assert_eq!(ranks, [4, 1, 1, 3]);
        let all = score(&logits, 0, 9);
        assert_eq!(all.top.iter().map(|top| top.0).collect::<Vec<_>>(), [1, 2, 3, 0]);
        assert_eq!(all.logprob, all.top[3].1);
        let mass: f64 = all.top.iter().map(|top| f64::from(top.1).exp()).sum();
        assert!((mass - 1.0).abs() < 1e-6);
    }

    #[test]
    fn rows_that_do_not_fit_their_tokens_are_an_error() {
        let row = || Drawn::Logits(vec![0.0, 1.0]);
        let text = |rows: &[Drawn], tokens: &[u32]| scores(rows, tokens, 5, 1).unwrap_err();
        assert_eq!(text(&[row()], &[0, 1]), "the step gave 1 rows of logits for 2 tokens");
        assert_eq!(text(&[row(), Drawn::Token(1)], &[0, 1]), "no logits at position 6");
        let bad = Drawn::Logits(vec![0.0, f32::NAN]);
        assert_eq!(text(&[row(), bad], &[0, 1]), "logit of id 1 at position 6 is NaN");
        assert_eq!(
            scores(&[row()], &[1], 5, 1).unwrap()[0].top,
            [(1, scores(&[row()], &[1], 5, 0).unwrap()[0].logprob)]
        );
    }
}
