//! Which experts a row passes, and by what weights: [`Routing`] in f32, one row at a time. Pure. Called by `moe`.

use backend::{Routing, Score};

/// An expert of a row, and its weight.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Choice {
    pub(crate) expert: u32,
    pub(crate) weight: f32,
}

/// Groups of experts at most.
const GROUPS_MAX: usize = 64;

/// Errors when the numbers do not fit each other.
pub(crate) fn check(routing: &Routing) -> Result<(), String> {
    let Routing { experts, top_k, groups, .. } = *routing;
    let (count, used) = groups.unwrap_or((1, 1));
    let fits =
        (1..=GROUPS_MAX).contains(&count) && used > 0 && used <= count && experts.is_multiple_of(count);
    if top_k == 0 || !fits || top_k > experts / count * used {
        return Err(format!("{top_k} of {experts} experts in {groups:?} groups"));
    }
    Ok(())
}

/// Chooses a row's experts, the best first; of equals the lower index. `scores` are the router's products `[experts]` and
/// become scores; `choices` is room for as many; `out` is `[top_k]`. `exp` is the level's exponential.
pub(crate) fn route(
    routing: &Routing,
    bias: Option<&[f32]>,
    exp: impl Fn(f32) -> f32,
    scores: &mut [f32],
    choices: &mut [f32],
    out: &mut [Choice],
) {
    match routing.score {
        Score::Softmax => {
            let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            scores.iter_mut().for_each(|x| *x = exp(*x - max));
            let sum: f32 = scores.iter().sum();
            scores.iter_mut().for_each(|x| *x /= sum);
        }
        Score::Sigmoid => scores.iter_mut().for_each(|x| *x = 1.0 / (1.0 + exp(-*x))),
    }
    for (at, (choice, score)) in choices.iter_mut().zip(&*scores).enumerate() {
        *choice = score + bias.map_or(0.0, |bias| bias[at]);
    }
    if let Some((groups, used)) = routing.groups
        && used < groups
    {
        leave_groups(choices, routing.experts / groups, used);
    }
    for place in 0..out.len() {
        let (taken, rest) = out.split_at_mut(place);
        let free = |expert: &usize| taken.iter().all(|choice| choice.expert as usize != *expert);
        let expert = best((0..choices.len()).filter(free), |expert| choices[expert]);
        rest[0] = Choice { expert: expert as u32, weight: scores[expert] };
    }
    let sum = match routing.normalise {
        true => out.iter().map(|choice| choice.weight).sum::<f32>() + routing.normalise_eps,
        false => 1.0,
    };
    out.iter_mut().for_each(|choice| choice.weight = choice.weight / sum * routing.scale);
}

/// Leaves the choices of the `used` groups of `size` with the largest sums of their two best; the others' become minus
/// infinity.
fn leave_groups(choices: &mut [f32], size: usize, used: usize) {
    let sum = |choices: &[f32], group: usize| {
        let members = &choices[group * size..(group + 1) * size];
        let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
        for choice in members {
            if *choice > first {
                (first, second) = (*choice, first);
            } else if *choice > second {
                second = *choice;
            }
        }
        if size > 1 { first + second } else { first }
    };
    let mut kept = 0u64;
    for _ in 0..used {
        let left = (0..choices.len() / size).filter(|group| kept >> group & 1 == 0);
        kept |= 1 << best(left, |group| sum(choices, group));
    }
    for (group, choices) in choices.chunks_exact_mut(size).enumerate() {
        if kept >> group & 1 == 0 {
            choices.fill(f32::NEG_INFINITY);
        }
    }
}

/// The index of the largest value, of equals the lowest; what is not a number comes last.
fn best(among: impl Iterator<Item = usize>, value: impl Fn(usize) -> f32) -> usize {
    let mut found: Option<(usize, f32)> = None;
    for at in among {
        let value = value(at);
        if found.is_none_or(|(_, most)| value > most || (most.is_nan() && !value.is_nan())) {
            found = Some((at, value));
        }
    }
    found.map_or(0, |(at, _)| at)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routed(routing: &Routing, bias: Option<&[f32]>, products: &[f32]) -> Vec<Choice> {
        check(routing).unwrap();
        let (mut scores, mut choices) = (products.to_vec(), vec![0.0; products.len()]);
        let mut out = vec![Choice::default(); routing.top_k];
        route(routing, bias, f32::exp, &mut scores, &mut choices, &mut out);
        out
    }

    const PLAIN: Routing = Routing {
        experts: 6,
        top_k: 3,
        score: Score::Sigmoid,
        groups: None,
        normalise: false,
        normalise_eps: 0.0,
        scale: 1.0,
    };

    fn experts(chosen: &[Choice]) -> Vec<u32> {
        chosen.iter().map(|choice| choice.expert).collect()
    }

    /// Equal scores go to the lower index, and a bias chooses but does not weigh.
    #[test]
    fn ties_and_biases() {
        let chosen = routed(&PLAIN, None, &[0.0, 1.0, 0.0, 1.0, 0.0, 1.0]);
        assert_eq!(experts(&chosen), [1, 3, 5]);
        let bias = [0.0, 0.0, 0.0, 0.0, 9.0, 0.0];
        let chosen = routed(&PLAIN, Some(&bias), &[0.0, 1.0, 0.0, 1.0, 0.0, 1.0]);
        assert_eq!(experts(&chosen), [4, 1, 3]);
        assert_eq!(chosen[0].weight, 0.5);
    }

    /// A group is as good as its two best; of equal groups the lower is used.
    #[test]
    fn groups_by_their_two_best() {
        let grouped = Routing { groups: Some((3, 1)), top_k: 2, ..PLAIN };
        let chosen = routed(&grouped, None, &[9.0, -9.0, 1.0, 1.0, 1.0, 1.0]);
        assert_eq!(experts(&chosen), [2, 3]);
    }

    /// Weights of the chosen are brought to a sum, then scaled.
    #[test]
    fn weights_are_normalised_and_scaled() {
        let routing = Routing { score: Score::Softmax, normalise: true, scale: 2.0, ..PLAIN };
        let chosen = routed(&routing, None, &[0.0; 6]);
        let sum: f32 = chosen.iter().map(|choice| choice.weight).sum();
        assert!((sum - 2.0).abs() < 1e-6, "{sum}");
    }

    /// Scores that are not numbers are chosen last, and as many experts come out all the same.
    #[test]
    fn not_a_number_comes_last() {
        let nan = f32::NAN;
        assert_eq!(experts(&routed(&PLAIN, None, &[nan, 1.0, nan, nan, 2.0, nan])), [4, 1, 0]);
    }
}
