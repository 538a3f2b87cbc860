import java.nio.charset.StandardCharsets;
import java.util.Properties;
import java.util.concurrent.CountDownLatch;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.StreamsBuilder;
import org.apache.kafka.streams.StreamsConfig;
import org.apache.kafka.streams.errors.StreamsUncaughtExceptionHandler.StreamThreadExceptionResponse;
import org.apache.kafka.streams.kstream.Consumed;
import org.apache.kafka.streams.kstream.KStream;
import org.apache.kafka.streams.kstream.Produced;
import org.apache.kafka.streams.kstream.Repartitioned;
import org.apache.kafka.streams.processor.api.ContextualFixedKeyProcessor;
import org.apache.kafka.streams.processor.api.FixedKeyProcessorContext;
import org.apache.kafka.streams.processor.api.FixedKeyRecord;
import org.apache.kafka.streams.state.KeyValueStore;
import org.apache.kafka.streams.state.StoreBuilder;
import org.apache.kafka.streams.state.Stores;

/**
 * The benchmarks' jobs for Kafka Streams: a running count and sum for each key, one output for each input, exactly
 * once. Arguments: bootstrap servers, application id, source, output, state directory, then NAME=VALUE settings.
 *
 * Settings of this program: bench.job=totals (the default), regrouped (through a repartition topic first, by 500
 * groups of keys), stateless; bench.store=memory (the default), rocksdb. A store in RocksDB has its record cache, as the
 * guides advise.
 */
public final class RunningTotals {
    private static final String STORE = "totals";
    private static final int GROUPS = 500;

    public static void main(String[] arguments) throws InterruptedException {
        Properties settings = new Properties();
        settings.put(StreamsConfig.BOOTSTRAP_SERVERS_CONFIG, arguments[0]);
        settings.put(StreamsConfig.APPLICATION_ID_CONFIG, arguments[1]);
        settings.put(StreamsConfig.STATE_DIR_CONFIG, arguments[4]);
        settings.put(StreamsConfig.PROCESSING_GUARANTEE_CONFIG, StreamsConfig.EXACTLY_ONCE_V2);
        settings.put(StreamsConfig.NUM_STREAM_THREADS_CONFIG, "2");
        settings.put(StreamsConfig.REPLICATION_FACTOR_CONFIG, "3");
        settings.put(StreamsConfig.consumerPrefix("auto.offset.reset"), "earliest");
        for (int index = 5; index < arguments.length; index++) {
            String[] parts = arguments[index].split("=", 2);
            settings.put(parts[0], parts[1]);
        }
        String job = (String) settings.getOrDefault("bench.job", "totals");
        String store = (String) settings.getOrDefault("bench.store", "memory");
        StreamsBuilder builder = new StreamsBuilder();
        KStream<byte[], byte[]> source =
            builder.stream(arguments[2], Consumed.with(Serdes.ByteArray(), Serdes.ByteArray()));
        KStream<byte[], byte[]> results;
        if (job.equals("stateless")) {
            results = source.mapValues(RunningTotals::convert);
        } else {
            StoreBuilder<KeyValueStore<byte[], String>> totals = Stores.keyValueStoreBuilder(
                store.equals("rocksdb") ? Stores.persistentKeyValueStore(STORE) : Stores.inMemoryKeyValueStore(STORE),
                Serdes.ByteArray(), Serdes.String());
            builder.addStateStore(store.equals("rocksdb") ? totals.withCachingEnabled() : totals);
            if (job.equals("regrouped")) {
                source = source.selectKey((key, value) -> group(key))
                    .repartition(Repartitioned.with(Serdes.ByteArray(), Serdes.ByteArray()));
            }
            results = source.processValues(Totals::new, STORE);
        }
        results.to(arguments[3], Produced.with(Serdes.ByteArray(), Serdes.ByteArray()));
        KafkaStreams streams = new KafkaStreams(builder.build(), settings);
        CountDownLatch ended = new CountDownLatch(1);
        streams.setStateListener((now, before) -> {
            System.err.println("STATE " + before + " -> " + now);
            if (now == KafkaStreams.State.ERROR || now == KafkaStreams.State.NOT_RUNNING) {
                ended.countDown();
            }
        });
        // A thread that fails is replaced, as the guides advise. Otherwise a broker's death can end the client.
        streams.setUncaughtExceptionHandler(error -> {
            System.err.println("REPLACED " + error);
            return StreamThreadExceptionResponse.REPLACE_THREAD;
        });
        Runtime.getRuntime().addShutdownHook(new Thread(streams::close));
        streams.start();
        ended.await();
    }

    private static byte[] convert(byte[] value) {
        String text = new String(value, StandardCharsets.UTF_8);
        return output(text, 1, 2 * number(text, "value"));
    }

    private static byte[] group(byte[] key) {
        long number = Long.parseLong(new String(key, StandardCharsets.UTF_8).substring(1));
        return ("g" + number % GROUPS).getBytes(StandardCharsets.UTF_8);
    }

    private static byte[] output(String text, long count, long sum) {
        String output = "{\"id\":" + number(text, "id") + ",\"key\":\"" + text(text, "key") + "\",\"count\":" + count
            + ",\"sum\":" + sum + ",\"at\":" + number(text, "at") + "}";
        return output.getBytes(StandardCharsets.UTF_8);
    }

    /** The text behind a name, in the compact JSON of this benchmark: no spaces, no nesting, no escapes. */
    private static String text(String text, String name) {
        int at = text.indexOf("\"" + name + "\":\"") + name.length() + 4;
        return text.substring(at, text.indexOf('"', at));
    }

    /** The number behind a name, in the same JSON. */
    private static long number(String text, String name) {
        int at = text.indexOf("\"" + name + "\":") + name.length() + 3;
        int end = at;
        while (end < text.length() && "-0123456789".indexOf(text.charAt(end)) >= 0) {
            end++;
        }
        return Long.parseLong(text.substring(at, end));
    }

    private static final class Totals extends ContextualFixedKeyProcessor<byte[], byte[], byte[]> {
        private KeyValueStore<byte[], String> store;

        @Override
        public void init(FixedKeyProcessorContext<byte[], byte[]> context) {
            super.init(context);
            store = context.getStateStore(STORE);
        }

        @Override
        public void process(FixedKeyRecord<byte[], byte[]> record) {
            String text = new String(record.value(), StandardCharsets.UTF_8);
            String state = store.get(record.key());
            long count = 1;
            long sum = number(text, "value");
            if (state != null) {
                int comma = state.indexOf(',');
                count += Long.parseLong(state.substring(0, comma));
                sum += Long.parseLong(state.substring(comma + 1));
            }
            store.put(record.key(), count + "," + sum);
            context().forward(record.withValue(output(text, count, sum)));
        }
    }
}
