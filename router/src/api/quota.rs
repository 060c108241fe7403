//! What the holder of one key has left: requests and tokens per minute, requests at once. Time is an argument.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::key_file::KeyLimits;

/// When a place is free cannot be known; this is asked for.
const PLACE_WAIT: Duration = Duration::from_secs(1);

/// One caller: whose requests are counted together.
#[derive(Debug)]
pub struct Caller {
    /// For people.
    pub name: String,
    /// Whose files, batches and responses it comes to: another for every key, and the same after every start.
    pub owner: String,
    /// Nobody waits for its answers: they are made when nothing else is to do.
    pub background: bool,
    limits: KeyLimits,
    buckets: Mutex<Buckets>,
    running: AtomicU32,
}

#[derive(Debug)]
struct Buckets {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
}

/// What a caller has used up, and for how long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exhausted {
    /// `requests per minute`, ...
    pub what: &'static str,
    /// The limit.
    pub limit: u32,
    /// Until there is some again.
    pub wait: Duration,
}

/// A place among the requests that run at once; given back when dropped.
#[derive(Debug)]
pub struct Place(Arc<Caller>);

impl Caller {
    /// Who has lines of `owner`'s batches answered: without limits, since such lines take what is left over.
    pub fn background(owner: &str, now: Instant) -> Arc<Caller> {
        let mut caller = Self::made("batch", owner, KeyLimits::default(), now);
        caller.background = true;
        Arc::new(caller)
    }

    /// A caller that has used nothing yet.
    pub fn new(name: &str, owner: &str, limits: KeyLimits, now: Instant) -> Arc<Caller> {
        Arc::new(Self::made(name, owner, limits, now))
    }

    fn made(name: &str, owner: &str, limits: KeyLimits, now: Instant) -> Caller {
        let bucket = |limit: Option<u32>| limit.map(|per_minute| Bucket::new(per_minute, now));
        let buckets = Buckets {
            requests: bucket(limits.requests_per_minute),
            tokens: bucket(limits.tokens_per_minute),
        };
        Caller {
            name: name.into(),
            owner: owner.into(),
            background: false,
            limits,
            buckets: Mutex::new(buckets),
            running: AtomicU32::new(0),
        }
    }

    /// The limits that it was made with.
    pub fn limits(&self) -> KeyLimits {
        self.limits
    }

    /// Lets a request in, or says what is used up.
    pub fn enter(self: &Arc<Self>, now: Instant) -> Result<Place, Exhausted> {
        let exhausted = |what, limit: Option<u32>, wait| Exhausted { what, limit: limit.unwrap_or(0), wait };
        let most = self.limits.concurrent.unwrap_or(u32::MAX);
        let take = |running: u32| (running < most).then(|| running + 1);
        if self.running.fetch_update(Ordering::AcqRel, Ordering::Acquire, take).is_err() {
            return Err(exhausted("requests at once", self.limits.concurrent, PLACE_WAIT));
        }
        let place = Place(Arc::clone(self));
        let mut buckets = self.lock();
        // Nothing is taken from one when the other is empty.
        if let Some(wait) = buckets.tokens.as_mut().and_then(|tokens| tokens.wait(now)) {
            return Err(exhausted("tokens per minute", self.limits.tokens_per_minute, wait));
        }
        if let Some(requests) = &mut buckets.requests {
            if let Some(wait) = requests.wait(now) {
                return Err(exhausted("requests per minute", self.limits.requests_per_minute, wait));
            }
            requests.take(1, now);
        }
        Ok(place)
    }

    /// Tokens of a prompt or an answer. Counted when they are known: what goes beyond the limit is paid for by waiting.
    pub fn used(&self, tokens: u32, now: Instant) {
        if let Some(bucket) = &mut self.lock().tokens {
            bucket.take(tokens, now);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Buckets> {
        self.buckets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Fills at `per_minute`, holds a minute's worth, and can be overdrawn.
#[derive(Debug)]
struct Bucket {
    per_minute: f64,
    level: f64,
    at: Instant,
}

impl Bucket {
    fn new(per_minute: u32, now: Instant) -> Bucket {
        Bucket { per_minute: per_minute.into(), level: per_minute.into(), at: now }
    }

    fn refill(&mut self, now: Instant) {
        let minutes = now.saturating_duration_since(self.at).as_secs_f64() / 60.0;
        self.level = (self.level + minutes * self.per_minute).min(self.per_minute);
        self.at = now;
    }

    /// How long until there is one; `None` when there is.
    fn wait(&mut self, now: Instant) -> Option<Duration> {
        self.refill(now);
        let missing = 1.0 - self.level;
        // A limit of zero is never refilled: an hour is long enough to say no.
        let seconds = (missing / self.per_minute * 60.0).min(3600.0);
        // Less than a millionth of one is an error of the sums.
        (missing > 1e-6).then(|| Duration::from_secs_f64(seconds.max(0.0)))
    }

    fn take(&mut self, amount: u32, now: Instant) {
        self.refill(now);
        self.level -= f64::from(amount);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(requests: Option<u32>, tokens: Option<u32>, concurrent: Option<u32>) -> KeyLimits {
        KeyLimits { requests_per_minute: requests, tokens_per_minute: tokens, concurrent }
    }

    #[test]
    fn requests_per_minute() {
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        let caller = Caller::new("a", "a", limits(Some(6), None, None), begun);
        for _ in 0..6 {
            assert!(caller.enter(at(0)).is_ok());
        }
        let exhausted = caller.enter(at(0)).unwrap_err();
        assert_eq!((exhausted.what, exhausted.limit), ("requests per minute", 6));
        assert_eq!(exhausted.wait, Duration::from_secs(10));
        assert!(caller.enter(at(10)).is_ok());
        assert!(caller.enter(at(10)).is_err());
        // An hour of silence is a minute's worth.
        for _ in 0..6 {
            assert!(caller.enter(at(3_600)).is_ok());
        }
        assert!(caller.enter(at(3_600)).is_err());
    }

    /// A long answer is served whole, and paid for by the next request.
    #[test]
    fn tokens_per_minute() {
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        let caller = Caller::new("a", "a", limits(Some(1), Some(600), None), begun);
        let place = caller.enter(at(0)).unwrap();
        caller.used(900, at(0));
        drop(place);
        let exhausted = caller.enter(at(0)).unwrap_err();
        assert_eq!(exhausted.what, "tokens per minute");
        assert_eq!(exhausted.wait.as_secs_f64().round(), 30.0);
        assert!(caller.enter(at(29)).is_err());
        // Refused for want of tokens, it cost no request.
        assert!(caller.enter(at(61)).is_ok());
    }

    #[test]
    fn at_once() {
        let now = Instant::now();
        let caller = Caller::new("a", "a", limits(None, None, Some(2)), now);
        let (first, _second) = (caller.enter(now).unwrap(), caller.enter(now).unwrap());
        assert_eq!(caller.enter(now).unwrap_err().what, "requests at once");
        drop(first);
        assert!(caller.enter(now).is_ok());
        let nobody = Caller::new("a", "a", limits(Some(0), None, None), now);
        assert_eq!(nobody.enter(now).unwrap_err().wait, Duration::from_secs(3600));
    }
}
