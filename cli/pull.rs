//! `baton pull`, and how a download is shown: bars at a terminal, lines elsewhere, the log in a role.

use std::io::{IsTerminal, stderr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use hub::{Bytes, Event, Found, Hub, HubError, ModelName, Want};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::config;
use crate::meter::Meter;
use crate::print;

/// Between two lines of progress.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// What is to be fetched.
#[derive(clap::Args)]
pub struct Args {
    /// ORG/NAME, ORG/NAME:QUANT for one quantisation of a GGUF repository, ORG/NAME@REVISION for another than main
    #[arg(value_name = "MODEL", required = true)]
    models: Vec<ModelName>,
    /// Only files whose names match, for instance '*.json' [default: what serving needs]
    #[arg(long, value_name = "GLOB")]
    file: Vec<String>,
}

/// Fetches each model, and prints where it is.
pub async fn run(args: Args) -> Result<()> {
    let hub = config::hub();
    let want = if args.file.is_empty() { Want::Model } else { Want::Files(args.file) };
    // Ctrl-C ends the process; what has arrived is used the next time.
    tokio::task::spawn_blocking(move || {
        let hub = Hub::new(hub);
        for name in &args.models {
            let shown = Shown::here(name.to_string());
            let found = shown.during(|watch| hub.pull(name, &want, watch))?;
            print(&format!("{}\n", found.path.display()));
        }
        Ok(())
    })
    .await?
}

/// Shows one download.
pub struct Shown<'s> {
    name: String,
    state: Mutex<State>,
    to: To<'s>,
}

enum To<'s> {
    Bars(MultiProgress),
    Lines(&'s (dyn Fn(&str) + Sync)),
}

#[derive(Default)]
struct State {
    files: Vec<File>,
    meter: Option<Meter>,
    said: Option<Instant>,
    total: Option<ProgressBar>,
}

struct File {
    name: String,
    len: u64,
    there: u64,
    bar: Option<ProgressBar>,
}

impl<'s> Shown<'s> {
    /// On standard error.
    pub fn here(name: String) -> Self {
        if stderr().is_terminal() {
            return Shown { name, state: Mutex::default(), to: To::Bars(MultiProgress::new()) };
        }
        Shown::lines(name, &|line| eprintln!("{line}"))
    }

    /// As lines that `say` writes.
    pub fn lines(name: String, say: &'s (dyn Fn(&str) + Sync)) -> Self {
        Shown { name, state: Mutex::default(), to: To::Lines(say) }
    }

    /// Runs `download`, which tells what it does, and takes what is shown away at its end.
    pub fn during(
        &self,
        download: impl FnOnce(hub::Watch<'_>) -> Result<Found, HubError>,
    ) -> Result<Found, HubError> {
        let found = download(&|event| self.on(&event, Instant::now()));
        if let To::Bars(bars) = &self.to {
            let _ = bars.clear();
        }
        found
    }

    fn on(&self, event: &Event<'_>, now: Instant) {
        let mut state = self.lock();
        match *event {
            Event::Asks(hub) => self.say(&format!("{}: asking {hub}", self.name)),
            Event::AsksAgain(reason) => self.say(&format!("{}: {reason}; asking again", self.name)),
            Event::Begin(files) => self.begin(&mut state, files, now),
            Event::Came(i, bytes) => {
                state.came(i, bytes, now);
                self.progress_line(&mut state, now);
            }
            Event::There(i, bytes) => state.there(i, bytes),
            Event::Again(i, reason) => {
                let text = format!("{}: {}: {reason}; going on", self.name, state.file(i));
                self.say(&text);
            }
            Event::Done(i) => {
                if let Some(bar) = state.files.get_mut(i).and_then(|file| file.bar.take()) {
                    bar.finish_and_clear();
                }
            }
        }
    }

    fn begin(&self, state: &mut State, files: &[(String, u64, u64)], now: Instant) {
        let (total, there) =
            files.iter().fold((0, 0), |(total, there), file| (total + file.1, there + file.2));
        *state = State { meter: Some(Meter::new(total, there, now)), said: Some(now), ..State::default() };
        state.files = files
            .iter()
            .map(|(name, len, there)| File { name: name.clone(), len: *len, there: *there, bar: None })
            .collect();
        if total == there {
            return;
        }
        let here = if there > 0 { format!(", {} are here", Bytes(there)) } else { String::new() };
        self.say(&format!("{}: fetching {} in {} files{here}", self.name, Bytes(total), files.len()));
        let To::Bars(bars) = &self.to else { return };
        let bar = bars.add(ProgressBar::new(total).with_style(style(true)));
        bar.set_position(there);
        bar.reset_eta();
        state.total = Some(bar);
        for file in &mut state.files {
            // Small files are done before one could read their names.
            if file.len > SMALL && file.there < file.len {
                let style = style(false);
                let bar =
                    bars.add(ProgressBar::new(file.len).with_message(file.name.clone()).with_style(style));
                bar.set_position(file.there);
                bar.reset_eta();
                file.bar = Some(bar);
            }
        }
    }

    fn progress_line(&self, state: &mut State, now: Instant) {
        let due = state.said.is_none_or(|said| now.saturating_duration_since(said) >= LINE_EVERY);
        if let (To::Lines(say), Some(meter), true) = (&self.to, &mut state.meter, due) {
            say(&format!("{}: {}", self.name, meter.line(now)));
            state.said = Some(now);
        }
    }

    fn say(&self, text: &str) {
        match &self.to {
            // An error would mean that the terminal is gone.
            To::Bars(bars) => drop(bars.println(text)),
            To::Lines(say) => say(text),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Files up to this size get no bar of their own.
const SMALL: u64 = 32 << 20;

fn style(whole: bool) -> ProgressStyle {
    let template = match whole {
        true => "{bar:30} {decimal_bytes} of {decimal_total_bytes}, {decimal_bytes_per_sec}, {eta} left",
        false => "  {bar:28} {percent:>3} % of {decimal_total_bytes}  {msg}",
    };
    // A template that is a constant is right or wrong for everybody.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

impl State {
    fn came(&mut self, i: usize, bytes: u64, now: Instant) {
        let Some(file) = self.files.get_mut(i) else { return };
        file.there += bytes;
        for bar in [&file.bar, &self.total].into_iter().flatten() {
            bar.inc(bytes);
        }
        if let Some(meter) = &mut self.meter {
            meter.moved(bytes, now);
        }
    }

    fn there(&mut self, i: usize, bytes: u64) {
        let Some(file) = self.files.get_mut(i) else { return };
        if file.there == bytes {
            return;
        }
        if let Some(meter) = &mut self.meter {
            meter.correct(file.there, bytes);
        }
        file.there = bytes;
        if let Some(bar) = &file.bar {
            bar.set_position(bytes);
            bar.reset_eta();
        }
        if let Some(bar) = &self.total {
            bar.set_position(self.files.iter().map(|file| file.there).sum());
            bar.reset_eta();
        }
    }

    fn file(&self, i: usize) -> &str {
        self.files.get(i).map_or("", |file| &file.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where nobody looks at a terminal: a line at the beginning, one every ten seconds, one per broken connection.
    #[test]
    fn lines() {
        let lines = Mutex::new(Vec::new());
        let say = |line: &str| lines.lock().expect("lines").push(line.to_owned());
        let shown = Shown::lines("o/n".into(), &say);
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        let files = [("a".to_owned(), 2_000_000_000, 500_000_000), ("b".to_owned(), 10, 0)];
        shown.on(&Event::Asks("https://h"), at(0));
        shown.on(&Event::AsksAgain("status 503"), at(0));
        shown.on(&Event::Begin(&files), at(0));
        for second in 1..=12 {
            shown.on(&Event::Came(0, 50_000_000), at(second));
        }
        shown.on(&Event::Again(0, "the connection ended early"), at(12));
        shown.on(&Event::Done(0), at(12));
        assert_eq!(
            *lines.lock().expect("lines"),
            [
                "o/n: asking https://h",
                "o/n: status 503; asking again",
                "o/n: fetching 2.00 GB in 2 files, 500.0 MB are here",
                "o/n: 1.00 GB of 2.00 GB, 50.0 MB/s, 21 s left",
                "o/n: a: the connection ended early; going on",
            ]
        );
        // All there: nothing to say.
        shown.on(&Event::Begin(&[("a".to_owned(), 7, 7)]), at(13));
        assert_eq!(lines.lock().expect("lines").len(), 5);
    }
}
