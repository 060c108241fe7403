//! Cases of mixtures of experts, against a plain f64 mixture.

use super::coded::Coded;
use super::exact::{bits, is_exact, ranks};
use super::{Case, Suite, Tensor, reference, rows_batch};
use crate::{
    Backend, BackendError, DType, DeviceOptions, ExpertSource, Glu, Group, KSum, KvSpec, Linear, MatrixView,
    Moe, Quant, Routing, Score, Step, TakeExpert, WeightSource,
};

pub(super) fn cases<'a, B: Backend>() -> Vec<Case<'a, B>> {
    vec![
        ("experts", mixtures),
        ("experts, exact", exact),
        ("experts, tensor parallel", tensor_parallel),
        ("experts, refused", refused),
    ]
}

/// A matrix of one expert, plain or quantised.
enum Matrix {
    Plain(Tensor),
    Coded(Coded),
}

impl Matrix {
    fn random(seed: u64, format: Option<Quant>, rows: usize, cols: usize) -> Self {
        match format {
            None => Matrix::Plain(Tensor::random(seed, DType::BF16, rows, cols, 0.15)),
            Some(format) => Matrix::Coded(Coded::random(seed, format, DType::BF16, rows, cols)),
        }
    }

    fn view(&self) -> MatrixView<'_> {
        match self {
            Matrix::Plain(plain) => plain.view().into(),
            Matrix::Coded(coded) => coded.view().into(),
        }
    }

    fn values(&self) -> &[f64] {
        match self {
            Matrix::Plain(plain) => &plain.values,
            Matrix::Coded(coded) => &coded.values,
        }
    }

    fn cut(&self, rows: std::ops::Range<usize>, cols: std::ops::Range<usize>) -> MatrixView<'_> {
        self.view().cut(rows, cols).unwrap_or_else(|error| panic!("cut: {error}"))
    }
}

/// Gate, up and down of one expert.
struct Expert {
    inner: usize,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    /// Of each.
    biases: Option<[Tensor; 3]>,
    glu: Glu,
}

impl Expert {
    fn random(seed: u64, format: Option<Quant>, hidden: usize, inner: usize) -> Self {
        Expert {
            inner,
            gate: Matrix::random(seed * 3, format, inner, hidden),
            up: Matrix::random(seed * 3 + 1, format, inner, hidden),
            down: Matrix::random(seed * 3 + 2, format, hidden, inner),
            biases: None,
            glu: Glu::Silu,
        }
    }

    /// With biases and a clamped gate.
    fn biased(self, seed: u64) -> Self {
        let bias = |at: u64, len: usize| Tensor::random(900 + seed * 3 + at, DType::BF16, 1, len, 0.5);
        let (inner, hidden) = (self.inner, self.down.view().rows());
        let biases = Some([bias(0, inner), bias(1, inner), bias(2, hidden)]);
        Expert { biases, glu: Glu::Clamped { limit: 1.5, slope: 1.702 }, ..self }
    }

    /// Gate and up, and down, as rank `rank` of `world` has them.
    fn share(&self, rank: usize, world: usize, ranges: usize) -> (Linear<'_>, Linear<'_>) {
        let own = rank * self.inner / world..(rank + 1) * self.inner / world;
        let (hidden, rows) = (self.gate.view().cols(), self.down.view().rows());
        let parts = [&self.gate, &self.up].map(|part| part.cut(own.clone(), 0..hidden)).to_vec();
        let down = vec![self.down.cut(0..rows, own.clone())];
        let inner_biases = self.biases.as_ref().map(|[gate, up, _]| {
            let cut = [gate, up].map(|bias| bias.view().cut(0..1, own.clone()));
            cut.map(|bias| bias.unwrap_or_else(|error| panic!("cut: {error}"))).to_vec()
        });
        let down_bias = self.biases.as_ref().filter(|_| rank == 0).map(|[.., down]| vec![down.view()]);
        (
            Linear { parts, bias: inner_biases, sum: KSum::Ascending },
            Linear { parts: down, bias: down_bias, sum: KSum::Tree { ranges: ranges / world } },
        )
    }

    fn output(&self, x: &[f64]) -> Vec<f64> {
        let bias = |at: usize| self.biases.as_ref().map(|biases| &biases[at].values[..]);
        let gate = reference::linear(x, self.gate.values(), bias(0));
        let up = reference::linear(x, self.up.values(), bias(1));
        reference::linear(&reference::glu(&[gate, up].concat(), self.glu), self.down.values(), bias(2))
    }
}

/// A mixture of a test.
struct Mixture {
    hidden: usize,
    ranges: usize,
    routing: Routing,
    router: Tensor,
    /// Of the scores.
    router_bias: Option<Tensor>,
    /// Of the choice.
    bias: Option<Tensor>,
    experts: Vec<Expert>,
    shared: Option<Expert>,
}

impl Mixture {
    /// As Qwen 3: softmax, weights brought to a sum of 1.
    fn softmax(format: Option<Quant>, hidden: usize, inner: usize) -> Self {
        let routing = Routing {
            experts: 10,
            top_k: 3,
            score: Score::Softmax,
            groups: None,
            normalise: true,
            normalise_eps: 0.0,
            scale: 1.0,
        };
        let expert = |seed| Expert::random(seed, format, hidden, inner);
        Mixture {
            hidden,
            ranges: 8,
            router: Tensor::random(70, DType::BF16, 10, hidden, 0.3),
            router_bias: None,
            bias: None,
            experts: (1..11).map(expert).collect(),
            shared: None,
            routing,
        }
    }

    /// As gpt-oss: biases everywhere, a clamped gate.
    fn biased(format: Option<Quant>, hidden: usize, inner: usize) -> Self {
        let mixture = Mixture::softmax(format, hidden, inner);
        let experts = mixture.experts.into_iter().zip(1..).map(|(expert, seed)| expert.biased(seed));
        let router_bias = Some(Tensor::random(73, DType::BF16, 1, 10, 0.5));
        Mixture { experts: experts.collect(), router_bias, ..mixture }
    }

    /// As DeepSeek V3: sigmoid, groups, a bias for the choice, a shared expert twice as wide.
    fn grouped(format: Option<Quant>, hidden: usize, inner: usize) -> Self {
        let routing = Routing {
            experts: 12,
            top_k: 4,
            score: Score::Sigmoid,
            groups: Some((4, 2)),
            normalise: true,
            normalise_eps: 1e-20,
            scale: 2.5,
        };
        let expert = |seed| Expert::random(seed, format, hidden, inner);
        Mixture {
            hidden,
            ranges: 8,
            router: Tensor::random(71, DType::F32, 12, hidden, 0.2),
            router_bias: None,
            bias: Some(Tensor::random(72, DType::F32, 1, 12, 0.3)),
            experts: (1..13).map(expert).collect(),
            shared: Some(Expert::random(40, format, hidden, 2 * inner)),
            routing,
        }
    }

    /// The experts of a row and their weights.
    fn route(&self, x: &[f64]) -> Vec<(usize, f64)> {
        let Routing { experts, top_k, score, groups, normalise, normalise_eps, scale } = self.routing.clone();
        let bias = self.router_bias.as_ref().map(|bias| &bias.values[..]);
        let products = reference::linear(x, &self.router.values, bias);
        let total: f64 = products.iter().map(|x| x.exp()).sum();
        let scores: Vec<f64> = products
            .iter()
            .map(|x| match score {
                Score::Softmax => x.exp() / total,
                Score::Sigmoid => 1.0 / (1.0 + (-x).exp()),
            })
            .collect();
        let mut choices: Vec<f64> = (0..experts)
            .map(|expert| scores[expert] + self.bias.as_ref().map_or(0.0, |bias| bias.values[expert]))
            .collect();
        let best = |values: &[f64]| {
            let mut order: Vec<usize> = (0..values.len()).collect();
            order.sort_by(|a, b| values[*b].total_cmp(&values[*a]).then(a.cmp(b)));
            order
        };
        if let Some((count, used)) = groups {
            let size = experts / count;
            let sums: Vec<f64> = choices
                .chunks(size)
                .map(|group| best(group).iter().take(2).map(|at| group[*at]).sum())
                .collect();
            for group in &best(&sums)[used..] {
                choices[group * size..(group + 1) * size].fill(f64::NEG_INFINITY);
            }
        }
        let chosen = &best(&choices)[..top_k];
        let sum: f64 = chosen.iter().map(|expert| scores[*expert]).sum::<f64>() + f64::from(normalise_eps);
        let weight = |expert: usize| scores[expert] / if normalise { sum } else { 1.0 } * f64::from(scale);
        chosen.iter().map(|expert| (*expert, weight(*expert))).collect()
    }

    fn output(&self, x: &[f64]) -> Vec<f64> {
        let mut out = vec![0.0; self.hidden];
        let shared = self.shared.iter().map(|expert| (expert, 1.0));
        let routed = self.route(x).into_iter().map(|(expert, weight)| (&self.experts[expert], weight));
        for (expert, weight) in routed.chain(shared) {
            out.iter_mut().zip(expert.output(x)).for_each(|(out, y)| *out += weight * y);
        }
        out
    }

    /// The joined outputs of rows `x`, as one rank of a group has them.
    fn run<B: Backend>(
        &self,
        suite: &Suite<'_, B>,
        options: &DeviceOptions,
        group: Group,
        x: &Tensor,
    ) -> Vec<f32> {
        let (rank, world) = (group.rank, group.world);
        let mut rig = suite.rig_with(options, group, &KvSpec::gqa(1, 1, 0..1, 8, options.dtype), 64);
        let router = rig.load(&WeightSource::Linear(Linear {
            parts: vec![self.router.view().into()],
            bias: self.router_bias.as_ref().map(|bias| vec![bias.view()]),
            sum: KSum::Ascending,
        }));
        let bias = self.bias.as_ref().map(|bias| rig.load(&WeightSource::Exact(bias.view())));
        let shares = self.experts.iter().map(|expert| expert.share(rank, world, self.ranges));
        let (gate_up, down): (Vec<_>, Vec<_>) = shares.unzip();
        let gate_up = rig.load(&WeightSource::Experts(&gate_up.as_slice()));
        let down = rig.load(&WeightSource::Experts(&down.as_slice()));
        let shared = self.shared.as_ref().map(|expert| {
            let (gate_up, down) = expert.share(rank, world, self.ranges);
            (rig.load(&WeightSource::Linear(gate_up)), rig.load(&WeightSource::Linear(down)))
        });
        rig.rows(x, |step, x| {
            let partial = step.moe(
                &x,
                &Moe {
                    router: &router,
                    routing: &self.routing,
                    choice_bias: bias.as_ref(),
                    gate_up: &gate_up,
                    down: &down,
                    shared: shared.as_ref().map(|(gate_up, down)| (gate_up, down)),
                    glu: self.experts[0].glu,
                },
            );
            step.all_reduce(partial)
        })
    }
}

/// Formats of experts that a test goes through: plain ones, and of the backend's some that differ.
fn formats<B: Backend>(suite: &Suite<'_, B>, dtype: DType) -> Vec<Option<Quant>> {
    let few = suite.quants.iter().filter(|format| format.align_cols() <= 64).step_by(3);
    let plain = suite.plain_experts.contains(&dtype).then_some(None);
    plain.into_iter().chain(few.copied().map(Some)).collect()
}

fn mixtures<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    for format in formats(suite, dtype) {
        for mixture in [
            Mixture::softmax(format, 64, 64),
            Mixture::grouped(format, 128, 64),
            Mixture::biased(format, 64, 128),
        ] {
            for rows in [1, 4, 41] {
                let x = Tensor::random(9, dtype, rows, mixture.hidden, 1.0);
                let got = mixture.run(suite, &suite.options(dtype), Group::alone(), &x);
                let want: Vec<f64> = (0..rows).flat_map(|row| mixture.output(x.row(row))).collect();
                let of = format.map_or("numbers".to_owned(), |format| format.to_string());
                suite.close(dtype, &format!("{rows} rows, experts of {of}"), &got, &want);
            }
        }
    }
}

/// A row has the same bits alone and among others, on any number of threads.
fn exact<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    if !is_exact(suite, dtype) {
        return;
    }
    let coded = suite.quants.iter().copied().find(|format| format.align_cols() == 32);
    for mixture in
        [Mixture::softmax(None, 72, 40), Mixture::grouped(coded, 64, 32), Mixture::biased(coded, 64, 64)]
    {
        let width = mixture.hidden;
        let x = Tensor::random(9, dtype, 80, width, 1.0);
        let run = |threads: usize, rows: std::ops::Range<usize>| {
            let options = DeviceOptions { threads, ..suite.options(dtype) };
            let values = rows.clone().flat_map(|row| x.row(row).to_vec());
            let x = Tensor::new(dtype, rows.len(), width, values);
            bits(&mixture.run(suite, &options, Group::alone(), &x))
        };
        let all = run(2, 0..80);
        for (threads, rows) in [(1, 0..80), (3, 0..1), (2, 7..9), (1, 20..51), (4, 79..80)] {
            let same = all[rows.start * width..rows.end * width] == run(threads, rows.clone());
            assert!(same, "rows {rows:?} on {threads} threads differ from rows among 80");
        }
    }
}

/// Two and four ranks give what one gives.
fn tensor_parallel<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    let Some(group) = suite.group else { return };
    let coded = suite.quants.iter().copied().find(|format| format.align_cols() == 32);
    // With 128 columns in groups of 32, four ranks have one group each, and their two ranges cut it.
    for mixture in
        [Mixture::softmax(None, 48, 64), Mixture::grouped(coded, 64, 128), Mixture::biased(coded, 64, 128)]
    {
        let x = Tensor::random(9, dtype, 13, mixture.hidden, 1.0);
        let options = suite.options(dtype);
        let alone = mixture.run(suite, &options, Group::alone(), &x);
        let exact = is_exact(suite, dtype);
        for world in [2, 4] {
            let all = ranks(group, world, |_, group| mixture.run(suite, &options, group, &x));
            // Rank 0 has every rank's sums side by side. It may be another process.
            let Some((0, sums)) = all.first() else { continue };
            let own: Vec<f32> =
                sums.chunks(world * mixture.hidden).flat_map(|row| row[..mixture.hidden].to_vec()).collect();
            match exact {
                true => assert_eq!(bits(&own), bits(&alone), "{world} ranks"),
                false => {
                    let want: Vec<f64> = alone.iter().map(|x| f64::from(*x)).collect();
                    suite.close(dtype, &format!("{world} ranks"), &own, &want);
                }
            }
        }
    }
}

/// Experts of which some only come.
struct Cut<'a> {
    experts: &'a [Linear<'a>],
    given: usize,
    /// Whether the next one cannot be read.
    lost: bool,
}

impl ExpertSource for Cut<'_> {
    fn count(&self) -> usize {
        self.experts.len()
    }

    fn each(&self, take: &mut TakeExpert<'_>) -> Result<(), BackendError> {
        self.experts[..self.given].iter().try_for_each(take)?;
        if self.lost { Err(BackendError::Source("the disk is gone".into())) } else { Ok(()) }
    }
}

fn refused<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    let mixture = Mixture::softmax(None, 16, 32);
    let odd = Expert::random(90, None, 16, 24);
    let mut rig = suite.rig(dtype);
    let mut experts: Vec<Linear<'_>> = mixture.experts.iter().map(|expert| expert.share(0, 1, 8).1).collect();
    experts[4] = odd.share(0, 1, 8).1;
    let loaded = rig.backend.load(&WeightSource::Experts(&experts.as_slice()));
    assert!(matches!(loaded, Err(BackendError::Weight { .. })), "experts of two shapes");
    assert!(rig.backend.load(&WeightSource::Experts(&[].as_slice())).is_err(), "no experts");
    experts[4] = mixture.experts[4].share(0, 1, 8).1;
    let bias = Tensor::random(91, DType::BF16, 1, 16, 0.5);
    experts[4].bias = Some(vec![bias.view()]);
    let loaded = rig.backend.load(&WeightSource::Experts(&experts.as_slice()));
    assert!(matches!(loaded, Err(BackendError::Weight { .. })), "a bias of one expert");
    experts[4].bias = None;
    let short = Cut { experts: &experts, given: 7, lost: false };
    let loaded = rig.backend.load(&WeightSource::Experts(&short));
    assert!(matches!(loaded, Err(BackendError::Weight { .. })), "7 experts of 10");
    let lost = Cut { lost: true, ..short };
    let loaded = rig.backend.load(&WeightSource::Experts(&lost)).err().map(|error| error.to_string());
    assert_eq!(loaded.as_deref(), Some("the disk is gone"), "the source's own error");

    let load = |rig: &mut super::Rig<B>, count: usize| {
        let shares = mixture.experts[..count].iter().map(|expert| expert.share(0, 1, 8));
        let (gate_up, down): (Vec<_>, Vec<_>) = shares.unzip();
        (
            rig.load(&WeightSource::Experts(&gate_up.as_slice())),
            rig.load(&WeightSource::Experts(&down.as_slice())),
        )
    };
    let (all, few) = (load(&mut rig, 10), load(&mut rig, 9));
    let router = rig.linear(&[&mixture.router], KSum::Ascending);
    let x = Tensor::random(9, dtype, 2, 16, 1.0);
    let table = rig.embedding(&x);
    let batch = rows_batch(2);
    let none = Routing { top_k: 0, ..mixture.routing.clone() };
    let many = Routing { groups: Some((5, 1)), ..mixture.routing.clone() };
    let uneven = Routing { groups: Some((3, 2)), ..mixture.routing.clone() };
    let wrong = [
        (&mixture.routing, &few.0, &few.1),
        (&mixture.routing, &all.1, &all.0),
        (&mixture.routing, &router, &all.1),
        (&none, &all.0, &all.1),
        (&many, &all.0, &all.1),
        (&uneven, &all.0, &all.1),
    ];
    for (at, (routing, gate_up, down)) in wrong.into_iter().enumerate() {
        let ran = rig.try_step(&batch, |step| {
            let x = step.embed(&table);
            let glu = Glu::Silu;
            let moe = Moe { router: &router, routing, choice_bias: None, gate_up, down, shared: None, glu };
            let partial = step.moe(&x, &moe);
            step.all_reduce(partial)
        });
        assert!(ran.is_err(), "mixture {at} of wrong numbers ran");
    }
}
